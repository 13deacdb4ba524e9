"""Score the trained model on every character, compare it with n-gram models, and break its loss down.

python -m stages.evaluate        models/gpt, data/prepared, results/train/{metrics,run}.json, {history,batches}.csv
                                 -> results/evaluate/{scores.json,metrics.json,losses.npz,*.csv}

If there is a test split, this is the only stage that reads it.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt import errors, params, program
from minigpt.evaluation import charts
from minigpt.files import (
    MODEL,
    PREPARED,
    RESULTS,
    atomic_directory,
    check_replaceable,
    require_json,
    write_csv,
    write_json,
)
from minigpt.runtime import cpu
from minigpt.tracking.sender import start_sender

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from minigpt.data.dataset import Corpus, EvalBatch, Split
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.evaluation.breakdown import Breakdown
    from minigpt.evaluation.by_file import FileRecorder
    from minigpt.evaluation.character_losses import CharacterLosses
    from minigpt.evaluation.loss import Score
    from minigpt.evaluation.ngrams import NGrams
    from minigpt.model import GPT
    from minigpt.tracking.run import Tracker

SHORT, UNCERTAIN = 10_000, 0.01
"""A warning is printed for splits of fewer characters, and for losses with a larger relative uncertainty."""

ROUNDED_CHARS = 16_384
"""Characters that show the effect of rounded weights. It is the difference on the same windows, so few are enough."""


def main() -> None:
    """Run the stage."""
    settings = params.load()
    check_replaceable(RESULTS / "evaluate")  # before the work
    sender = start_sender()  # imports MLflow meanwhile
    cpu.configure_cpu()  # before torch is imported
    counting = start_counting()  # meanwhile, torch is imported
    renderer = charts.Renderer()  # likewise
    from minigpt import export
    from minigpt.data import dataset, splits
    from minigpt.evaluation import by_file
    from minigpt.evaluation.breakdown import Breakdown
    from minigpt.runtime.device import choose_device, compute_dtype
    from minigpt.tracking.run import tracker_of_model

    tracker = tracker_of_model(RESULTS / "train" / "run.json", sender)
    renderer.draw(charts.loss_chart, str(RESULTS / "train"), settings.data.source, name="train/loss.png")
    device = choose_device(settings.train.device)
    model, tokenizer = export.load_model(MODEL, device)
    model.compute_dtype = compute_dtype(settings.train.dtype, device)
    corpus = dataset.load_corpus(PREPARED, device, with_test=True)
    if corpus.tokenizer.characters != tokenizer.characters:
        raise errors.UserError(
            f"{MODEL}: its vocabulary differs from that of {PREPARED}; train again with `dvc repro train`"
        )

    ngrams = counting.result()
    sizes = {"train": len(corpus.train), "val": len(corpus.val)} | ({"test": corpus.n_test} if corpus.test else {})
    parts = splits.load_files(PREPARED, sizes)
    files = {name: by_file.FileRecorder(splits.ranges(parts, name)) for name in reversed(sizes) if name != "train"}
    breakdown = Breakdown(model.config.block_size, tokenizer, device)
    stride = settings.evaluate.stride or model.config.block_size // 2
    test = score_text("test", model, corpus.test, tokenizer, files=files["test"])[0] if corpus.test else None
    val, losses = score_validation(model, corpus, stride, breakdown, files["val"])
    baselines, versus_ngram = score_baselines(ngrams, corpus, losses)
    tables = {"baselines": baseline_rows(val, baselines), **breakdown.tables()}
    renderer.draw(charts.evaluation_chart, tables, settings.data.source, name="evaluate/evaluation.png")
    train = score_training(model, corpus.train, settings.evaluate.train_chars)
    metrics = {"test": test} if test else {}
    metrics |= {"val": val, "train": train, "baselines": baselines, "versus_ngram": versus_ngram}
    rows = [row for name, recorder in files.items() for row in recorder.rows(name)]
    with atomic_directory(RESULTS / "evaluate") as folder:
        for name, table in tables.items():
            write_csv(folder / f"{name}.csv", table)
        losses.save(folder)
        if rows:
            write_csv(folder / by_file.FILE, rows)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "scores.json", scores(metrics, require_json(RESULTS / "train" / "metrics.json", "metrics")))
    renderer.finish()
    track(tracker, settings, metrics, renderer.folder)


def start_counting() -> Future[NGrams]:
    """Count the n-grams of the training split in a thread. If its file is damaged, the result is an error."""
    import numpy as np

    from minigpt.data.encode import SPLITS
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.evaluation.ngrams import count_ngrams

    def count() -> NGrams:
        tokens = np.load(PREPARED / SPLITS[0], mmap_mode="r")
        return count_ngrams(tokens, Tokenizer.load(PREPARED / "tokenizer.json").vocab_size)

    # Each of the many calls of NumPy waits for the import, for this many seconds; by default, ten times as long.
    sys.setswitchinterval(0.0005)
    return ThreadPoolExecutor(1).submit(count)


def score_text(
    name: str,
    model: GPT,
    split: Split,
    tokenizer: Tokenizer,
    *,
    files: FileRecorder,
    callbacks: Sequence[Callable[[EvalBatch, Tensor, Tensor], None]] = (),
) -> tuple[dict[str, Any], CharacterLosses]:
    """Score every character of a held-out split without overlap, also for its ``files`` and other ``callbacks``.

    Returns:
        the metrics, and the loss of each character.
    """
    from minigpt.evaluation import paired
    from minigpt.evaluation.character_losses import LossRecorder, scored_nats, text_digest
    from minigpt.evaluation.loss import score

    recorder = LossRecorder(len(split) - 1)

    def record(batch: EvalBatch, logits: Tensor, nats: Tensor) -> None:
        for callback in callbacks:
            callback(batch, logits, nats)
        recorder.add(batch, logits, nats)
        files.extend(scored_nats(batch, nats))

    scored = score(model, split, callback=record)
    metrics = summarize(name, scored)
    losses = recorder.result(text_digest(split.tokens.numpy(force=True), tokenizer))
    estimate = paired.loss(losses)
    if not math.isfinite(estimate.standard_error):
        print(f"minigpt: {name}: {scored.count:,} characters are too few to say how certain this loss is")
        return metrics, losses
    metrics["standard_error"] = estimate.standard_error
    if scored.count < SHORT or estimate.margin > UNCERTAIN * scored.loss:
        print(
            f"minigpt: {name}: on other text of this kind, the loss may differ by {estimate.margin:.2g} nats\n"
            f"  (95 % interval); more than {scored.count:,} characters would be more certain"
        )
    return metrics, losses


def score_validation(
    model: GPT, corpus: Corpus, stride: int, breakdown: Breakdown, files: FileRecorder
) -> tuple[dict[str, Any], CharacterLosses]:
    """Score the validation split without overlap, with overlapping windows, and with rounded weights.

    Returns:
        the metrics, and the loss of each character without overlap.
    """
    from minigpt.evaluation.loss import OverlapRecorder, score
    from minigpt.quantize import loss_by_weights

    val, block_size = corpus.val, model.config.block_size
    overlap = OverlapRecorder(block_size, stride) if block_size % stride == 0 else None
    callbacks = [breakdown.add, *([overlap.add] if overlap else [])]
    metrics, losses = score_text("val", model, val, corpus.tokenizer, files=files, callbacks=callbacks)
    exact = metrics["loss"]
    loss_at_stride = overlap.finish(model, val) if overlap else score(model, val, stride).loss
    print(f"minigpt: val with windows every {stride} characters: {loss_at_stride:.4f} nats")

    sampled = len(val) - 1 > ROUNDED_CHARS
    reference = score(model, val, max_chars=ROUNDED_CHARS).loss if sampled else exact

    def score_rounded(other: GPT) -> float:
        return exact if other is model else exact + score(other, val, max_chars=ROUNDED_CHARS).loss - reference

    by_weights = loss_by_weights(model, score_rounded)
    costs = [f"{name} {loss - by_weights['float32']:+.4f}" for name, loss in by_weights.items() if name != "float32"]
    print(f"minigpt: rounded weights cost: {', '.join(costs)} nats")
    metrics |= {
        "stride": stride,
        "loss_at_stride": loss_at_stride,
        "accuracy": breakdown.accuracy,
        "calibration_error": breakdown.calibration_error,
        "loss_by_weights": by_weights,
    }
    return metrics, losses


def score_training(model: GPT, train: Split, max_chars: int) -> dict[str, Any]:
    """Score the training split, or a sample of about ``max_chars`` characters."""
    from minigpt.evaluation.loss import score

    scored = score(model, train, max_chars=max_chars)
    metrics = summarize("train", scored) | {"split_characters": scored.total}
    if scored.count == scored.total or scored.windows > 1:
        metrics["sampling_error"] = scored.sampling_error
    if scored.count < scored.total:
        error = f"; standard error {scored.sampling_error:.2g} nats" if scored.windows > 1 else ""
        print(f"minigpt: train is a sample of the split's {scored.total:,} characters{error}")
    return metrics


def summarize(name: str, scored: Score) -> dict[str, Any]:
    """Print the loss of a split and return it in each unit."""
    bits, count = scored.bits, scored.count
    if not math.isfinite(scored.loss):
        raise errors.UserError(f"{MODEL}: the {name} loss is {scored.loss}; the weights are damaged or too large")
    print(f"minigpt: {name}: {scored.loss:.4f} nats, {bits:.4f} bits per character, {count:,} characters")
    return {"loss": scored.loss, "bits_per_character": bits, "perplexity": scored.perplexity, "characters": count}


def score_baselines(model: NGrams, corpus: Corpus, losses: CharacterLosses) -> tuple[dict[str, float], dict[str, Any]]:
    """Score the validation split with n-gram models of the training split, and compare the best with ``losses``.

    Returns:
        the losses of the n-gram models in nats per character; the best of them with its paired difference from the
        GPT, and the number of counted characters.
    """
    from minigpt.evaluation import ngrams, paired
    from minigpt.evaluation.character_losses import LossRecorder

    train, val = (split.tokens.numpy(force=True) for split in (corpus.train, corpus.val))
    recorders = [LossRecorder(len(val) - 1) for _ in range(model.order)]

    def record(nats: NDArray[np.float64]) -> None:
        for recorder, values in zip(recorders, nats, strict=True):
            recorder.extend(values)

    baselines = ngrams.score_ngrams(model, val, record)
    line = "minigpt: " + ", ".join(f"{name} {loss:.4f}" for name, loss in baselines.items()) + " nats"
    print(textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False))
    names = list(baselines)[1:]  # without uniform guessing
    best = min(names, key=lambda name: baselines[name])
    versus = {"name": best, "loss": baselines[best], "difference": paired.loss(losses).value - baselines[best]}
    if recorders[0].characters == losses.characters:  # not if the split is so long that only a sample is scored
        estimate = paired.difference(recorders[names.index(best)].result(losses.text), losses)
        if math.isfinite(estimate.standard_error):
            versus |= {"standard_error": estimate.standard_error}
    return baselines, versus | {"counted_characters": min(len(train), ngrams.MAX_TRAIN_CHARS)}


def scores(metrics: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """Return the few metrics by which experiments are compared, from those of this stage and of the stage train.

    The loss of a test split is the first: the best step does not depend on it.
    """
    val = metrics["val"]
    return {
        **({"test_loss": metrics["test"]["loss"]} if "test" in metrics else {}),
        "val_loss": val["loss"],
        **({"standard_error": val["standard_error"]} if "standard_error" in val else {}),
        "bits_per_character": val["bits_per_character"],
        "versus_ngram": metrics["versus_ngram"]["difference"],
        "train_loss": metrics["train"]["loss"],
        "best_step": train["best_step"],
        "parameters": train["parameters"],
        "train_seconds": train["train_seconds"],
    }


def baseline_rows(val: dict[str, Any], baselines: dict[str, float]) -> list[dict[str, Any]]:
    """Return the losses of the model and of the n-gram models as rows of a table."""
    losses = {"this model": val["loss"]} | baselines
    return [{"model": name, "loss": loss} for name, loss in losses.items()]


def track(tracker: Tracker, settings: params.Params, metrics: dict[str, Any], pictures: Path) -> None:
    """Add the results, and the folders of ``pictures``, one for each stage, to the MLflow run of the model."""
    tracker.journal.artifact(RESULTS / "evaluate")
    for folder in pictures.iterdir():
        tracker.journal.artifact(folder)
    tracker.note(RESULTS, "train", "evaluate")
    numbers = {name: value for name, value in params.flatten(metrics).items() if not isinstance(value, str)}
    tracker.stage("evaluate", params.flatten(settings.evaluate, "evaluate."), numbers)


if __name__ == "__main__":
    program.run(main)
