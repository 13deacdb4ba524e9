"""Score the trained model on every character, compare it with n-gram models, and break its loss down.

python -m stages.evaluate        models/gpt, data/prepared -> results/evaluate/{metrics.json,*.csv}
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt import errors, params
from minigpt.files import atomic_directory, check_replaceable, write_csv, write_json
from minigpt.runtime import cpu
from stages import MODEL, PREPARED, RESULTS

if TYPE_CHECKING:
    from minigpt.data.dataset import Corpus, Split
    from minigpt.evaluation.breakdown import Breakdown
    from minigpt.evaluation.loss import Score
    from minigpt.model import GPT
    from minigpt.tracking.run import Tracker

Z_95 = 1.96
"""Standard errors on either side of an estimate in a 95 % confidence interval."""

SHORT, UNCERTAIN = 10_000, 0.01
"""A warning is printed for splits of fewer characters, and for losses with a larger relative uncertainty."""


def main() -> None:
    """Run the stage."""
    settings = params.load()
    check_replaceable(RESULTS / "evaluate")  # before the work
    cpu.configure_cpu()  # before torch is imported
    from minigpt import export
    from minigpt.data import dataset
    from minigpt.evaluation.breakdown import Breakdown
    from minigpt.runtime.device import choose_device, compute_dtype
    from minigpt.tracking.run import tracker_of_model

    tracker = tracker_of_model(RESULTS / "train" / "run.json")
    device = choose_device(settings.train.device)
    model, tokenizer = export.load_model(MODEL, device)
    model.compute_dtype = compute_dtype(settings.train.dtype, device)
    corpus = dataset.load_corpus(PREPARED, device)
    if corpus.tokenizer.characters != tokenizer.characters:
        raise errors.UserError(
            f"{MODEL}: its vocabulary differs from that of {PREPARED}; train again with `dvc repro train`"
        )

    breakdown = Breakdown(model.config.block_size, tokenizer, device)
    stride = settings.evaluate.stride or model.config.block_size // 2
    metrics = {
        "val": score_validation(model, corpus.val, stride, breakdown),
        "train": score_training(model, corpus.train, settings.evaluate.train_chars),
        "baselines": score_ngrams(corpus),
    }
    compared = compare(metrics)
    with atomic_directory(RESULTS / "evaluate") as folder:
        breakdown.write(folder)
        write_csv(folder / "baselines.csv", compared)
        write_json(folder / "metrics.json", metrics)
    track(tracker, settings, metrics, breakdown, compared)


def score_validation(model: GPT, val: Split, stride: int, breakdown: Breakdown) -> dict[str, Any]:
    """Score the validation split without overlap, with overlapping windows, and with rounded weights."""
    from minigpt.evaluation.loss import score
    from minigpt.quantize import loss_by_weights

    scored = score(model, val, callback=breakdown.add)
    metrics = summarize("val", scored)
    if scored.windows > 1:
        metrics["standard_error"] = scored.standard_error
        margin = Z_95 * scored.standard_error
        if scored.count < SHORT or margin > UNCERTAIN * scored.loss:
            print(
                f"minigpt: the validation split is short: {scored.count:,} characters determine the loss to "
                f"+-{margin:.2g} nats (95 % confidence); smaller differences between models may be chance"
            )
    overlapping = score(model, val, stride)
    print(f"minigpt: val with windows every {stride} characters: {overlapping.loss:.4f} nats")

    by_weights = loss_by_weights(model, lambda other: scored.loss if other is model else score(other, val).loss)
    costs = [f"{name} {loss - by_weights['float32']:+.4f}" for name, loss in by_weights.items() if name != "float32"]
    print(f"minigpt: val with rounded weights, compared with float32: {', '.join(costs)} nats")
    return metrics | {
        "stride": stride,
        "loss_at_stride": overlapping.loss,
        "accuracy": breakdown.accuracy,
        "calibration_error": breakdown.calibration_error,
        "loss_by_weights": by_weights,
    }


def score_training(model: GPT, train: Split, max_chars: int) -> dict[str, Any]:
    """Score the training split, or a sample of about ``max_chars`` characters."""
    from minigpt.evaluation.loss import score

    scored = score(model, train, max_chars=max_chars)
    metrics = summarize("train", scored) | {"split_characters": scored.total}
    if scored.count == scored.total or scored.windows > 1:
        metrics["sampling_error"] = scored.sampling_error
    if scored.count < scored.total:
        error = f"standard error {scored.sampling_error:.2g} nats"
        print(f"minigpt: train is a sample of the split's {scored.total:,} characters; {error}")
    return metrics


def summarize(name: str, scored: Score) -> dict[str, Any]:
    """Print the loss of a split and return it in each unit."""
    bits, count = scored.bits, scored.count
    if not math.isfinite(scored.loss):
        raise errors.UserError(f"{MODEL}: the {name} loss is {scored.loss}; the weights are damaged or too large")
    print(f"minigpt: {name}: {scored.loss:.4f} nats, {bits:.4f} bits per character, {count:,} characters")
    return {"loss": scored.loss, "bits_per_character": bits, "perplexity": scored.perplexity, "characters": count}


def score_ngrams(corpus: Corpus) -> dict[str, float]:
    """Score the validation split with n-gram models of the training split."""
    from minigpt.evaluation import ngrams

    train, val = (split.tokens.numpy(force=True) for split in (corpus.train, corpus.val))
    losses = ngrams.ngram_losses(train, val, corpus.tokenizer.vocab_size)
    print("minigpt: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) + " nats")
    return losses | {"characters": min(len(train), ngrams.MAX_TRAIN_CHARS)}


def compare(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the losses of the model and of the n-gram models as rows of a table."""
    losses = {"this model": metrics["val"]["loss"]} | metrics["baselines"]
    return [{"model": name, "loss": loss} for name, loss in losses.items() if name != "characters"]


def track(
    tracker: Tracker,
    settings: params.Params,
    metrics: dict[str, Any],
    breakdown: Breakdown,
    compared: list[dict[str, Any]],
) -> None:
    """Add the results and a chart of them to the MLflow run of the model."""
    from minigpt.evaluation import charts

    tracker.journal.artifact(RESULTS / "evaluate")
    with tempfile.TemporaryDirectory() as temporary:
        chart = Path(temporary) / "evaluation.png"
        tracker.attempt(
            "evaluation chart", lambda: charts.evaluation_chart(breakdown, compared, settings.data.source, chart)
        )
        if chart.exists():
            tracker.journal.artifact(chart, "evaluate")
    tracker.note(RESULTS, "train", "evaluate")
    tracker.stage("evaluate", params.flatten(settings.evaluate, "evaluate."), params.flatten(metrics))


if __name__ == "__main__":
    errors.run(main)
