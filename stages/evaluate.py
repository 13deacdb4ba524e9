"""Score the trained model on every character of both splits.

python -m stages.evaluate        models/gpt, data/prepared -> results/evaluate/metrics.json
"""

from __future__ import annotations

from minigpt import errors, params, process
from minigpt.files import replacing, write_json
from stages import MODEL, PREPARED, RESULTS


def main() -> None:
    """Run the stage."""
    settings = params.load()
    process.settle()
    from minigpt import checkpoint, corpus, ranks, tracking
    from minigpt.score import score

    tracker = tracking.of_model(RESULTS / "train" / "run.json")
    device = ranks.choose_device(settings.train.device)
    model, tokenizer = checkpoint.load_model(MODEL, device)
    model.compute_dtype = ranks.compute_dtype(settings.train.dtype, device)
    text = corpus.load(PREPARED, device)
    if text.tokenizer.characters != tokenizer.characters:
        raise errors.UserError(f"{MODEL}: trained on another vocabulary than that of {PREPARED}; `dvc repro train`")

    stride = settings.evaluate.stride or model.config.block_size // 2
    metrics = {}
    for name, split in (("val", text.val), ("train", text.train)):
        whole = score(model, split)
        metrics[name] = {
            "loss": whole.loss,
            "bits_per_character": whole.bits,
            "perplexity": whole.perplexity,
            "characters": whole.count,
        }
        print(
            f"minigpt: {name}: {whole.loss:.4f} nats, {whole.bits:.4f} bits per character, {whole.count:,} characters"
        )
    overlapping = score(model, text.val, stride)
    metrics["val"] |= {"stride": stride, "loss_at_stride": overlapping.loss}
    print(f"minigpt: val with windows every {stride} characters: {overlapping.loss:.4f} nats")

    with replacing(RESULTS / "evaluate") as folder:
        write_json(folder / "metrics.json", metrics)
    tracker.stage("evaluate", params.flatten(settings.evaluate, "evaluate."), params.flatten(metrics))


if __name__ == "__main__":
    errors.run(main)
