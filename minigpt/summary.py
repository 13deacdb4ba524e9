"""Summary of the results of all stages, for a terminal of 80 columns."""

import csv
import itertools
from pathlib import Path

from minigpt import params
from minigpt.errors import UserError
from minigpt.files import require_json
from minigpt.tracking.store import local_store_uri, resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

FILES = [
    "train/metrics.json", "train/history.csv", "evaluate/metrics.json", "sample/metrics.json", "sample/samples.txt",
]  # fmt: skip


def summarize(model: Path, results: Path) -> str:
    """Return the summary of the stages that wrote to the folders ``model`` and ``results``."""
    for name in FILES:
        if not (results / name).is_file():
            raise UserError(f"{results / name}: no such file; `dvc repro` writes it")
    try:
        return _summary(model, results)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{results}: damaged ({reason}); `dvc checkout dvc.yaml` restores the files") from None


def _summary(model: Path, results: Path) -> str:
    source = params.load().data.source
    train, evaluation, sample = (
        require_json(results / stage / "metrics.json", "metrics") for stage in ("train", "evaluate", "sample")
    )
    val, copied, held_out = evaluation["val"], sample["memorised"], sample["held_out"]
    best, ngram = min((loss, name) for name, loss in evaluation["baselines"].items() if name != "characters")
    comparison = "better" if val["loss"] < best else "worse"
    error = f", standard error {val['standard_error']:.2g}" if "standard_error" in val else ""
    with (results / "train" / "history.csv").open(newline="", encoding="utf-8") as file:
        untrained = float(next(csv.DictReader(file))["val_loss"])
    sample_lines = filter(str.strip, (results / "sample" / "samples.txt").read_text(encoding="utf-8").split("\n")[1:])
    excerpt = "\n".join(f"  | {line[:75]}" for line in itertools.islice(sample_lines, 12))
    uri = Uploader(resolve_tracking_uri()).display_uri
    local = uri == local_store_uri()
    runs = "make ui" if local else f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    minutes, seconds = divmod(round(train["train_seconds"]), 60)
    return f"""
  {source}
  {train["parameters"]:,} parameters, {train["steps"]:,} steps in {minutes} min {seconds:02} s

  validation loss   {val["loss"]:.4f} nats, {val["bits_per_character"]:.4f} bits per character
                    exact over {val["characters"]:,} characters{error}
                    before training: {untrained:.4f} nats
  training loss     {evaluation["train"]["loss"]:.4f} nats at the best step, {train["best_step"]:,}
  best n-gram model {best:.4f} nats, a {ngram}; the GPT is {abs(best - val["loss"]):.4f} {comparison}
  calibration error {val["calibration_error"]:.4f}; the most likely character is correct in {val["accuracy"]:.1%}
  copied            at most {copied["longest_run"]} characters, {copied["share_of_8_grams"]:.0%} of 8-grams
                    held-out text: {held_out["longest_run"]} characters, {held_out["share_of_8_grams"]:.0%} of 8-grams

{excerpt}

  model     {model}/
  sample    {results}/sample/samples.txt
  page      {results}/sample/page.html: the model in a web page (make page)
  metrics   {results}/evaluate/metrics.json, {results}/train/history.csv
  charts    dvc plots show
  runs      {"mlflow.db" if local else uri}

  Next steps

    source .venv/bin/activate
    git add dvc.lock && git commit -m "First run"    the baseline of experiments
    dvc exp run -S model.n_embd=512                  train a wider model
    dvc exp show --only-changed                      compare the experiments
    {runs:<48} show the curves
    make shakespeare                                 train on a larger text
"""
