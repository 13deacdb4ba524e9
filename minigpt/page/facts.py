"""The facts of a page: its models, and the results of the stages that made them."""

import csv
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import params
from minigpt.data.dataset import Corpus, load_corpus
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation.ngrams import NGrams
from minigpt.export import load_model
from minigpt.files import MODEL, PREPARED, RESULTS, read_json
from minigpt.model import GPT
from minigpt.page.build import Facts, choose_dtype, pack, write_page
from minigpt.params import SampleParams, SamplingParams, WeightFormat

MAX_TEXT_BYTES = 2_000_000
"""Largest training text that a page contains, in UTF-8."""

MAX_PAIRS = 50_000
"""Pairs of characters in the bigram model; a page with more would be slow to open, so it has no bigram model."""

MAX_EXACT = 2**53
"""Integers up to here are exact in JavaScript."""


@dataclass(frozen=True)
class PageModel:
    """A model for a page. ``root`` is the workspace that trained it, if it is known.

    The page shows the name of the run, or ``name`` if it is unknown.
    """

    name: str
    model: GPT
    tokenizer: Tokenizer
    root: Path | None = None

    @classmethod
    def load(cls, folder: Path) -> "PageModel":
        """Read an exported model. A folder ``models/gpt`` belongs to the workspace that contains it."""
        resolved = folder.resolve()
        root = resolved.parents[1] if resolved.parts[-2:] == MODEL.parts else None
        return cls(root.name if root else "/".join(resolved.parts[-2:]), *load_model(folder), root)


def build_page(
    models: Sequence[PageModel],
    output: Path,
    dtype: WeightFormat = "auto",
    sampling: SampleParams | None = None,
    corpus: Corpus | None = None,
) -> int:
    """Write a page with one or two models, and return its size in bytes.

    The facts other than the models are those of the first one: ``sampling`` and ``corpus`` are by default those of its
    workspace.

    Raises:
        UserError: the page would be too large.
    """
    described, weights = [], []
    for number, page_model in enumerate(models):
        tensors, packed = pack(page_model.model, choose_dtype(page_model.model, dtype))
        weights.append(packed)
        described.append(describe_model(page_model) | tensors | {"weights": f"weights{number}"})
    first = models[0]
    facts = {"models": described}
    facts |= describe_sampling(sampling or _sampling_of(first.root), [each.tokenizer for each in models])
    if first.root:
        facts |= describe_training(first.root / RESULTS)
        facts |= describe_corpus(corpus or _corpus_of(first.root), first.tokenizer)
    return write_page(output, facts, weights)


def describe_model(page_model: PageModel) -> Facts:
    """Return the entry of a model: its name, architecture and vocabulary, and its run."""
    tokenizer = page_model.tokenizer
    run = _describe_run(page_model)
    return {
        "name": run.get("name", page_model.name),
        "config": page_model.model.config.model_dump(),
        "characters": tokenizer.characters,
        "normalize": tokenizer.normalize,
        "run": run,
    }


def describe_sampling(sampling: SampleParams | None, tokenizers: Sequence[Tokenizer]) -> Facts:
    """Return the settings that the page starts with, and the first prompt of characters that all models know."""
    values = (sampling or SamplingParams()).model_dump(exclude={"num_samples", "dtype", "compile"})
    prompts = values.pop("prompts", ["\n"])
    if values["seed"] > MAX_EXACT:
        values["seed"] = str(values["seed"])
    if values["overflow"] == "slide":  # in a browser, it takes seconds for each character
        values["overflow"] = "reread"
    known = (prompt for prompt in prompts if not any(each.without_unknown(prompt)[1] for each in tokenizers))
    return {"sampling": values, "prompt": next(known, None)}


def describe_training(results: Path) -> Facts:
    """Return the history, the samples during training and the loss by position, as far as they exist."""
    tables = {
        "history": (results / "train" / "history.csv", ("step", "train_loss", "val_loss")),
        "samples": (results / "train" / "samples.csv", ("step", "prompt", "text")),
        "positions": (results / "evaluate" / "positions.csv", ("loss",)),
    }
    facts: Facts = {}
    for name, (path, columns) in tables.items():
        with suppress(OSError, ValueError, KeyError, csv.Error), path.open(newline="", encoding="utf-8") as file:
            facts[name] = [
                {column: row[column] if column in ("prompt", "text") else _number(row[column]) for column in columns}
                for row in csv.DictReader(file)
            ]
    if "positions" in facts:
        facts["positions"] = [row["loss"] for row in facts["positions"]]
    return facts


def describe_corpus(corpus: Corpus | None, tokenizer: Tokenizer) -> Facts:
    """Return the training text if it is short, and a bigram model of it; nothing if it has another vocabulary."""
    if corpus is None or corpus.tokenizer.characters != tokenizer.characters:
        return {}
    return {"corpus": training_text(corpus), "bigram": bigram(corpus)}


def training_text(corpus: Corpus) -> str | None:
    """Return the training split, or None if it has more than MAX_TEXT_BYTES."""
    if len(corpus.train) > MAX_TEXT_BYTES:
        return None
    text = corpus.tokenizer.decode(corpus.train.tokens.numpy(force=True))
    return text if len(text.encode("utf-8", "surrogatepass")) <= MAX_TEXT_BYTES else None


def bigram(corpus: Corpus) -> Facts | None:
    """Return a 2-gram model like that of the stage evaluate, or None if it has too many pairs.

    It counts the end of a text that is too long for a page.
    The probability of character c after b is that of the pair b * V + c in ``frequencies``, 0 if ``pairs`` lacks it,
    plus backoff[b] * unigram[c].
    """
    V = corpus.tokenizer.vocab_size
    model = NGrams(corpus.train.tokens[-MAX_TEXT_BYTES:].numpy(force=True), V, order=2)
    if model.order < 2 or max(V, len(model.grams[1])) > MAX_PAIRS:
        return None
    labels, pairs = model.grams[0], model.grams[1]  # a pair is labelled by the rank of its first character
    unigram = np.full(V, float(model.distinct[0].backoff[0]) / V)
    unigram[labels] += model.distinct[0].frequencies
    backoff = np.ones(V)
    backoff[labels] = model.raw[1].backoff
    return {
        "pairs": (labels[pairs // V] * V + pairs % V).tolist(),
        "frequencies": _rounded(model.raw[1].frequencies),
        "backoff": _rounded(backoff),
        "unigram": _rounded(unigram),
    }


def _rounded(values: Any) -> list[float]:
    """Return numbers with six significant digits: all digits would take 100 KB in a page."""
    return [float(f"{value:.6g}") for value in values]


def _describe_run(page_model: PageModel) -> Facts:
    """Return the size of the model and, as far as they exist, name, commit, date, text, losses and best n-gram."""
    run: Facts = {"parameters": page_model.model.num_parameters()}
    if page_model.root is None:
        return run
    results = page_model.root / RESULTS
    record, train, evaluation = (
        _read_json(results / path) for path in ("train/run.json", "train/metrics.json", "evaluate/metrics.json")
    )
    run |= {key: value for key, value in record.items() if isinstance(value, str)}
    train = _numbers(train)
    run |= {key: train[key] for key in ("steps", "best_step", "train_seconds", "val_loss") if key in train}
    val, baselines = (_numbers(evaluation.get(name)) for name in ("val", "baselines"))
    if "loss" in val:
        run["val_loss"] = val["loss"]
    if "standard_error" in val:
        run["standard_error"] = val["standard_error"]
    ngrams = {name: loss for name, loss in baselines.items() if name.endswith("gram")}
    if ngrams:
        loss, name = min((loss, name) for name, loss in ngrams.items())
        run |= {"best_ngram": {"name": name, "loss": loss}, "baselines": baselines}
    return run


def _sampling_of(root: Path | None) -> SampleParams | None:
    """Return the section ``sample`` of the params of a workspace, or None if there is none that is valid."""
    if root is not None:
        with suppress(UserError):
            return params.load(root / "params.yaml").sample
    return None


def _corpus_of(root: Path) -> Corpus | None:
    """Return the corpus of a workspace, or None if there is none that is intact."""
    with suppress(UserError):
        return load_corpus(root / PREPARED)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if it does not exist or is damaged."""
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}


def _numbers(values: Any) -> dict[str, Any]:
    """Return the finite numbers of a part of a JSON file, empty if the file has something else there."""
    items = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in items if isinstance(value, int | float) and math.isfinite(value)}


def _number(text: str | None) -> Any:
    """Return a cell of a table as a number with six significant digits; None if it is missing, empty or not finite."""
    try:
        value = float(text or "")
    except ValueError:
        return text or None
    return None if not math.isfinite(value) else int(value) if value.is_integer() else _rounded([value])[0]
