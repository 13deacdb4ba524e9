import base64

import numpy as np
import pytest
from helpers.browser import chromium, opened
from helpers.experiments import results_folder, two_losses

from minigpt.comparison import page
from minigpt.comparison.experiment import Experiment, Folder
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation.character_losses import text_digest

CHARACTERS = "\n ab<é"


@pytest.fixture
def pair(tmp_path):
    """Two experiments on one text; the second is better, and most of all at the letter a."""
    tokenizer = Tokenizer(CHARACTERS)
    ids = np.random.default_rng(0).integers(0, len(CHARACTERS), 6001).astype(tokenizer.dtype)
    first, second = (nats + 1 for nats in two_losses())  # no loss is negative
    second = np.where(np.array(list(tokenizer.decode(ids[1:]))) == "a", first - 0.5, second)
    folders = []
    for name, nats, width in (("first", first, 128), ("second", second, 512)):
        digest = text_digest(ids, tokenizer)
        folders.append(results_folder(tmp_path / name, nats, text=digest, model={"n_embd": width}))
        (folders[-1] / "data/prepared").mkdir(parents=True)
        np.save(folders[-1] / "data/prepared/val.npy", ids)
        tokenizer.save(folders[-1] / "data/prepared/tokenizer.json")
    return [Experiment(folder.name, Folder(folder)) for folder in folders], tokenizer.decode(ids[1:]), (first, second)


def test_facts_have_the_losses_of_each_character(pair):
    chosen, text, expected = pair
    facts = page.facts(chosen)
    assert facts["text"] == text
    for packed, nats in zip(facts["nats"], expected, strict=True):
        thousandths = np.frombuffer(base64.b64decode(packed), "<u2")
        assert np.abs(thousandths / 1000 - nats).max() < 0.00051
    (only,) = facts["pairs"]
    assert only["verdict"].startswith("second is better than first by 0.")
    assert facts["params"] == [["model.n_embd", "128", "512"]]
    assert facts["histories"][0][1] == {"step": 25, "train_loss": 2.5, "val_loss": 2.6}


def test_text_of_other_data_is_not_shown(pair, tmp_path):
    chosen, _, _ = pair
    Tokenizer("0123456789").save(tmp_path / "first/data/prepared/tokenizer.json")
    assert page.facts(chosen)["text"] is None
    (tmp_path / "first/data/prepared/val.npy").unlink()
    assert page.facts(chosen)["text"] is None


@pytest.mark.parametrize("name", ["val.npy", "tokenizer.json"])
def test_damaged_text_is_an_error_that_names_the_experiment(pair, tmp_path, name):
    (tmp_path / "first/data/prepared" / name).write_bytes(b"{damaged")
    with pytest.raises(UserError, match=r"^first: data/prepared/val.npy or .*tokenizer.json is damaged; `dvc checkout"):
        page.facts(pair[0])


def test_wrong_number_of_experiments_and_a_folder_are_refused(pair, tmp_path):
    chosen, _, _ = pair
    with pytest.raises(UserError, match="--html: expected 2 to 6 experiments, got 1"):
        page.write_page(chosen[:1], tmp_path / "page.html")
    with pytest.raises(UserError, match=r"is a folder; expected a file, such as .*comparison.html"):
        page.write_page(chosen, tmp_path)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_page_shows_where_the_models_differ(pair, tmp_path):
    chosen, text, (first, second) = pair
    path = tmp_path / "comparison.html"
    page.write_page(chosen, path)
    with chromium() as browser, opened(browser, path) as tab:
        assert "second is better than first" in tab.inner_text("#verdicts")
        assert tab.inner_text("#characters .signed dt >> nth=0").split("\n")[0] == "a"
        share = float(tab.inner_text("#characters .signed dd >> nth=0").replace("\u2212", "-"))
        assert share == pytest.approx((second - first)[np.array(list(text)) == "a"].sum() / len(text), abs=2e-4)
        assert tab.locator("#parts .signed > div").count() == 20
        tab.click("#text .c >> nth=3")
        assert f"first {first[3]:.3f}, second {second[3]:.3f} nats" in tab.inner_text("#text .stats")
        tab.keyboard.press("ArrowRight")
        assert "character 5:" in tab.inner_text("#text .stats")
        tab.evaluate("document.querySelector('input[type=range]').value = 2")
        tab.dispatch_event("input[type=range]", "input")
        assert tab.inner_text("#text .text").startswith(text[5000:5010].strip("\n "))
