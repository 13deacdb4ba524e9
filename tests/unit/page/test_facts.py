import json
import math

import numpy as np
import pytest
import torch
from helpers.models import build
from helpers.workspace import params_with

from minigpt.data import encode
from minigpt.data.dataset import load_corpus
from minigpt.data.tokenizer import Tokenizer
from minigpt.evaluation.ngrams import NGrams
from minigpt.export import export
from minigpt.files import write_csv, write_json
from minigpt.model import GPT
from minigpt.page import facts as page_facts
from minigpt.page.facts import PageModel, build_page

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
RUN = {
    "run": "f00d",
    "name": "</script> 2x20",
    "commit": "c0ffee",
    "date": "2026-11-24T10:00:00+00:00",
    "source": "a.txt",
}
METRICS = {
    "val": {"loss": 1.25, "bits_per_character": 1.8, "standard_error": 0.01, "characters": 180},
    "baselines": {"uniform": 3.3, "unigram": 2.9, "2-gram": 1.5, "3-gram": 1.4},
}


@pytest.fixture
def workspace(tmp_path):
    """A workspace with the outputs of all stages."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    encode.encode_corpus(tmp_path / "a.txt", 0.1, tmp_path / "data" / "prepared")
    tokenizer = load_corpus(tmp_path / "data" / "prepared").tokenizer
    gpt = GPT(params_with().model, tokenizer.vocab_size)
    export(tmp_path / "models" / "gpt", gpt.config, gpt.state_dict(), tokenizer)
    train, evaluate = tmp_path / "results" / "train", tmp_path / "results" / "evaluate"
    train.mkdir(parents=True)
    evaluate.mkdir()
    write_json(train / "run.json", RUN)
    write_json(train / "metrics.json", {"steps": 12, "best_step": 10, "val_loss": 1.3, "train_seconds": 2.5})
    write_csv(train / "history.csv", [{"step": 0, "train_loss": 3.25, "val_loss": 3.5, "grad_norm": 1.0}])
    write_csv(train / "samples.csv", [{"step": 0, "prompt": "\n", "text": "1.50"}])
    write_json(evaluate / "metrics.json", METRICS)
    write_csv(evaluate / "positions.csv", [{"position": 1, "loss": 2.5, "count": 9}])
    return tmp_path


def facts_of(output):
    content = output.read_text(encoding="utf-8").partition('id="facts">')[2].partition("</script>")[0]
    return json.loads(content)


def built(*folders, output, **how):
    build_page([PageModel.load(folder) for folder in folders], output, **how)
    return facts_of(output)


def test_page_has_the_facts_of_all_stages(workspace):
    facts = built(workspace / "models" / "gpt", output=workspace / "page.html")
    run = facts["models"][0]["run"]
    assert RUN.items() <= run.items()
    assert (run["val_loss"], run["standard_error"], run["steps"]) == (1.25, 0.01, 12)
    assert run["best_ngram"] == {"name": "3-gram", "loss": 1.4}
    assert facts["history"] == [{"step": 0, "train_loss": 3.25, "val_loss": 3.5}]
    assert facts["samples"] == [{"step": 0, "prompt": "\n", "text": "1.50"}]
    assert facts["positions"] == [2.5]
    assert TEXT.startswith(facts["corpus"])
    assert len(facts["corpus"]) > 0.8 * len(TEXT)
    (model,) = facts["models"]
    assert model["name"] == RUN["name"]
    assert model["characters"] == "".join(sorted(set(TEXT)))
    assert model["config"]["n_layer"] == 2


def test_page_of_a_model_alone_has_the_default_sampling_parameters(workspace):
    folder = workspace / "elsewhere"
    (workspace / "models" / "gpt").rename(folder)
    facts = built(folder, output=workspace / "page.html")
    assert set(facts) == {"models", "sampling", "prompt"}
    assert set(facts["models"][0]["run"]) == {"parameters"}
    assert facts["models"][0]["name"] == f"{folder.parent.name}/{folder.name}"
    assert (facts["sampling"]["temperature"], facts["sampling"]["overflow"]) == (0.8, "reread")


def test_page_for_two_models_has_both_with_their_runs(workspace, tmp_path):
    other = tmp_path / "other"
    export(other, build().config, build(tied_head=False).state_dict(), Tokenizer("abcdefghijk"))
    facts = built(workspace / "models" / "gpt", other, output=workspace / "page.html", dtype="int8")
    first, second = facts["models"]
    assert (first["weights"], second["weights"]) == ("weights0", "weights1")
    assert (first["run"]["name"], second["run"].get("name")) == (RUN["name"], None)
    assert second["characters"] == "abcdefghijk"
    assert first["dtype"] == second["dtype"] == "int8"


@pytest.mark.parametrize("name", ["train/run.json", "train/metrics.json", "evaluate/metrics.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', "\0"])
def test_missing_and_damaged_results_are_left_out(workspace, name, content):
    path = workspace / "results" / name
    path.unlink() if content is None else path.write_text(content)
    assert built(workspace / "models" / "gpt", output=workspace / "page.html")["models"][0]["run"]["parameters"] > 0


@pytest.mark.parametrize(
    "content", ['{"val": {"loss": NaN}}', '{"val": [1], "baselines": 2}', '{"val": {"loss": "a"}}']
)
def test_values_that_are_no_numbers_are_left_out(workspace, content):
    (workspace / "results/evaluate/metrics.json").write_text(content)
    (workspace / "results/train/metrics.json").write_text('{"steps": Infinity, "val_loss": [1]}')
    run = built(workspace / "models" / "gpt", output=workspace / "page.html")["models"][0]["run"]
    assert not {"val_loss", "steps", "baselines"} & set(run)


@pytest.mark.parametrize("name", ["train/history.csv", "train/samples.csv", "evaluate/positions.csv"])
@pytest.mark.parametrize("content", [None, "a,b\n1,2\n"])
def test_missing_and_damaged_tables_are_left_out(workspace, name, content):
    path = workspace / "results" / name
    path.unlink() if content is None else path.write_text(content)
    assert path.stem not in built(workspace / "models" / "gpt", output=workspace / "page.html")


def test_a_long_training_text_is_not_embedded(workspace, monkeypatch):
    monkeypatch.setattr(page_facts, "MAX_TEXT_BYTES", 1000)
    facts = built(workspace / "models" / "gpt", output=workspace / "page.html")
    assert facts["corpus"] is None
    assert facts["bigram"]["pairs"]


def test_text_of_another_vocabulary_is_not_embedded(workspace):
    export(workspace / "models" / "gpt", build().config, build().state_dict(), Tokenizer("abcdefghijk"))
    facts = built(workspace / "models" / "gpt", output=workspace / "page.html")
    assert not {"corpus", "bigram"} & set(facts)


def test_bigram_model_is_that_of_the_evaluation(workspace):
    corpus = load_corpus(workspace / "data" / "prepared")
    V, found = corpus.tokenizer.vocab_size, page_facts.bigram(corpus)
    pairs = dict(zip(found["pairs"], found["frequencies"], strict=True))
    ids = np.asarray(corpus.val.tokens)
    expected = NGrams(np.asarray(corpus.train.tokens), V).nats(ids)[1]
    nats = [
        -math.log(pairs.get(b * V + c, 0) + found["backoff"][b] * found["unigram"][c])
        for b, c in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)
    ]
    assert nats == pytest.approx(expected.tolist(), rel=1e-4)
    total = [
        sum(pairs.get(b * V + c, 0) + found["backoff"][b] * found["unigram"][c] for c in range(V)) for b in range(V)
    ]
    assert total == pytest.approx([1] * V, abs=1e-4)


def test_bigram_model_with_too_many_pairs_is_left_out(workspace, monkeypatch):
    monkeypatch.setattr(page_facts, "MAX_PAIRS", 20)
    assert page_facts.bigram(load_corpus(workspace / "data" / "prepared")) is None


@pytest.mark.parametrize("seed, shown", [(1337, 1337), (2**53, 2**53), (2**53 + 1, "9007199254740993")])
def test_seed_that_javascript_would_round_is_a_text(seed, shown):
    sampling = params_with(sample={"seed": seed, "overflow": "slide"}).sample
    facts = page_facts.describe_sampling(sampling, [Tokenizer("\nab")])
    assert facts["sampling"]["seed"] == shown
    assert facts["sampling"]["overflow"] == "reread"
    assert facts["prompt"] == "\n"


def test_page_of_two_models_starts_with_a_prompt_that_both_know():
    sampling = params_with(sample={"prompts": ["a", "b"]}).sample
    assert page_facts.describe_sampling(sampling, [Tokenizer("ab"), Tokenizer("bc")])["prompt"] == "b"
    assert page_facts.describe_sampling(sampling, [Tokenizer("ab"), Tokenizer("cd")])["prompt"] is None


def test_numbers_of_tables_are_finite(workspace):
    write_csv(workspace / "results/train/history.csv", [{"step": 0, "train_loss": math.inf, "val_loss": math.nan}])
    facts = built(workspace / "models" / "gpt", output=workspace / "page.html")
    assert facts["history"] == [{"step": 0, "train_loss": None, "val_loss": None}]


def test_row_of_a_table_that_is_cut_off_has_empty_cells(workspace):
    (workspace / "results/train/history.csv").write_text("step,train_loss,val_loss\n0,1.5,1.5\n10,1.25\n")
    facts = built(workspace / "models" / "gpt", output=workspace / "page.html")
    assert facts["history"][1] == {"step": 10, "train_loss": 1.25, "val_loss": None}


def test_page_is_a_function_of_its_inputs(workspace):
    torch.manual_seed(1)
    first, second = workspace / "a.html", workspace / "b.html"
    built(workspace / "models" / "gpt", output=first)
    built(workspace / "models" / "gpt", output=second)
    assert first.read_bytes() == second.read_bytes()
