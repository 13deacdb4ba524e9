"""Description of a run in Markdown, which MLflow's pages show above everything else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt.files import read_json
from minigpt.tracking.store import RUN_ID

SAMPLE_LINES, SAMPLE_WIDTH = 12, 100


def describe_results(results: Path, stages: Iterable[str]) -> str:
    """Return the description of a run from the files that its ``stages`` wrote to the folder ``results``."""
    read = {stage: read_json(results / stage / "metrics.json") for stage in stages}
    paragraphs = [_training(read["train"])]
    if "evaluate" in read:
        paragraphs.append(_comparison(read["evaluate"]))
    if "sample" in read:
        text = (results / "sample" / "samples.txt").read_text(encoding="utf-8").split("\n", 1)[-1]
        lines = [line[:SAMPLE_WIDTH].replace("`", "'") for line in text.split("\n") if line.strip()][:SAMPLE_LINES]
        paragraphs += ["A sample:", "\n".join(["```text", *lines, "```"])]
        if (results / "sample" / "page.html").exists():
            paragraphs.append("The model in a web page: artifact `sample/page.html`.")
    serve = f"mlflow models serve --model-uri runs:/{RUN_ID}/model --env-manager local --port 5001"
    paragraphs.append(f"To serve the model, set `MLFLOW_TRACKING_URI` to this server and use `{serve}`.")
    return "\n\n".join(paragraphs)


def _training(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps in {metrics['train_seconds']:.0f} s; "
        f"the best step is {metrics['best_step']:,}."
    )


def _comparison(metrics: dict[str, Any]) -> str:
    val, ngram = metrics["val"], metrics["versus_ngram"]
    difference = f"{abs(ngram['difference']):.4f} {'better' if ngram['difference'] < 0 else 'worse'}"
    # The validation loss chose the best step. The test loss did not, so it is the result.
    first = f"{_loss('Test', metrics['test'])}.\n\n" if "test" in metrics else ""
    return (
        f"{first}{_loss('Validation', val)}, "
        f"{difference} than the best n-gram model, a {ngram['name']} with {ngram['loss']:.4f}."
    )


def _loss(split: str, metrics: dict[str, Any]) -> str:
    """Return the loss of a split in bold, with its error, and in bits."""
    error = f" ± {metrics['standard_error']:.4f}" if "standard_error" in metrics else ""
    return (
        f"**{split} loss {metrics['loss']:.4f}{error} nats** ({metrics['bits_per_character']:.4f} bits per character)"
    )
