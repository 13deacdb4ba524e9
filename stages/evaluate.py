"""Score the trained model on every character, beside models that only count, and say where its loss comes from.

python -m stages.evaluate        models/gpt, data/prepared -> results/evaluate/{metrics.json,*.csv}
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from minigpt import errors, params
from minigpt.files import atomic_directory, write_csv, write_json
from minigpt.runtime import cpu
from stages import MODEL, PREPARED, RESULTS

SURE = 1.96
"""Standard errors to either side of a loss that the true one is within, 95 times of 100."""

COARSE, SHORT = 0.01, 10_000
"""What is uncertain of a loss is said in words from this share of it on, and for splits of fewer characters."""


def main() -> None:
    """Run the stage."""
    settings = params.load()
    cpu.configure_cpu()
    from minigpt import export
    from minigpt.data import dataset
    from minigpt.evaluation import charts, ngrams
    from minigpt.evaluation.breakdown import Breakdown
    from minigpt.evaluation.loss import Score, score
    from minigpt.quantize import loss_by_weights
    from minigpt.runtime.device import choose_device, compute_dtype
    from minigpt.tracking.run import tracker_of_model

    tracker = tracker_of_model(RESULTS / "train" / "run.json")
    device = choose_device(settings.train.device)
    model, tokenizer = export.load_model(MODEL, device)
    model.compute_dtype = compute_dtype(settings.train.dtype, device)
    text = dataset.load_corpus(PREPARED, device)
    if text.tokenizer.characters != tokenizer.characters:
        raise errors.UserError(f"{MODEL}: trained on another vocabulary than that of {PREPARED}; `dvc repro train`")

    def figures(name: str, scored: Score) -> dict[str, Any]:
        bits, count = scored.bits, scored.count
        print(f"minigpt: {name}: {scored.loss:.4f} nats, {bits:.4f} bits per character, {count:,} characters")
        return {
            "loss": scored.loss,
            "bits_per_character": bits,
            "perplexity": scored.perplexity,
            "characters": count,
        }

    report = Breakdown(model.config.block_size, tokenizer, device)
    val = score(model, text.val, watch=report.add)
    metrics = {"val": figures("val", val)}
    if val.windows > 1:
        metrics["val"]["standard_error"] = val.standard_error
        if val.count < SHORT or SURE * val.standard_error > COARSE * val.loss:
            print(
                f"minigpt: the validation split is short: {val.count:,} characters tell the loss on such text to "
                f"+-{SURE * val.standard_error:.2g} nats (95 %); smaller differences between models may be chance"
            )
    stride = settings.evaluate.stride or model.config.block_size // 2
    overlapping = score(model, text.val, stride)
    print(f"minigpt: val with windows every {stride} characters: {overlapping.loss:.4f} nats")
    metrics["val"] |= {
        "stride": stride,
        "loss_at_stride": overlapping.loss,
        "accuracy": report.accuracy,
        "calibration_error": report.calibration_error,
    }

    by_weights = loss_by_weights(model, lambda variant: val.loss if variant is model else score(variant, text.val).loss)
    metrics["val"]["loss_by_weights"] = by_weights
    costs = [f"{name} {loss - by_weights['float32']:+.4f}" for name, loss in by_weights.items() if name != "float32"]
    print(f"minigpt: val with rounded weights, against float32 throughout: {', '.join(costs)} nats")

    train = score(model, text.train, max_chars=settings.evaluate.train_chars)
    metrics["train"] = figures("train", train) | {"split_characters": train.of}
    if train.count == train.of or train.windows > 1:
        metrics["train"]["sampling_error"] = train.sampling_error
    if train.count < train.of:
        print(f"minigpt: a sample of train's {train.of:,} characters; standard error {train.sampling_error:.2g} nats")

    ids = [split.tokens.numpy(force=True) for split in (text.train, text.val)]
    counted = ngrams.losses(ids[0], ids[1], tokenizer.vocab_size)
    metrics["baselines"] = counted | {"characters": min(len(text.train), ngrams.COUNTED)}
    print("minigpt: " + ", ".join(f"{name} {loss:.4f}" for name, loss in counted.items()) + " nats")

    written = RESULTS / "evaluate"
    with atomic_directory(written) as folder:
        report.write(folder)
        compared = [{"model": name, "loss": loss} for name, loss in ({"this model": val.loss} | counted).items()]
        write_csv(folder / "baselines.csv", compared)
        write_json(folder / "metrics.json", metrics)
    tracker.journal.artifact(written)
    with tempfile.TemporaryDirectory() as temporary:
        chart = Path(temporary) / "evaluation.png"
        tracker.attempt("evaluation chart", lambda: charts.evaluation(report, compared, settings.data.source, chart))
        if chart.exists():
            tracker.journal.artifact(chart, written.name)
    tracker.stage("evaluate", params.flatten(settings.evaluate, "evaluate."), params.flatten(metrics))


if __name__ == "__main__":
    errors.run(main)
