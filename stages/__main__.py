"""Sum up, for people, what the stages have made: ``python -m stages``."""

from __future__ import annotations

import csv
import json
import textwrap
from typing import Any

from minigpt import errors, params
from minigpt.tracking import store, uploader
from stages import MODEL, RESULTS

LINES = 12
"""Lines of the sample that are shown."""


def main() -> None:
    """Print the summary.

    Raises:
        UserError: a stage has not been run.
    """
    settings = params.load()
    train, scores = _json("train/metrics.json"), _json("evaluate/metrics.json")
    val, baselines, written = scores["val"], scores["baselines"], _json("sample/metrics.json")
    counts, best = min((loss, name) for name, loss in baselines.items() if name != "characters")
    side = "better" if val["loss"] < counts else "worse"
    error = f", standard error {val['standard_error']:.2g}" if "standard_error" in val else ""
    copied, held_out = written["memorised"], written["held_out"]
    with (RESULTS / "train" / "history.csv").open(newline="") as file:
        first = float(next(csv.DictReader(file))["val_loss"])
    sample = (RESULTS / "sample" / "samples.txt").read_text(encoding="utf-8").split("\n")
    shown = [line for line in sample[1:] if line.strip()][:LINES]
    place = uploader.Uploader(store.resolve_tracking_uri()).display_uri
    here = place == store.local_store_uri()
    elsewhere = f"open {place}" if place.startswith("http") else f"mlflow ui --backend-store-uri {place}"
    minutes, seconds = divmod(round(train["train_seconds"]), 60)
    print(f"""
  {settings.data.source}: {train["parameters"]:,} parameters, {train["steps"]:,} steps in {minutes} min {seconds:02} s

  validation loss   {val["loss"]:.4f} nats, {val["bits_per_character"]:.4f} bits per character
                    exact over {val["characters"]:,} characters{error}; before training {first:.4f} nats
  training loss     {scores["train"]["loss"]:.4f} nats at the best step, {train["best_step"]:,}
  by counting       {counts:.4f} nats, a {best}: the model is {abs(counts - val["loss"]):.4f} {side}
  calibration       off by {val["calibration_error"]:.4f}; {val["accuracy"]:.1%} of likeliest characters came
  copied            at most {copied["longest_run"]} characters in a row; {copied["share_of_8_grams"]:.0%} of runs of 8
                    (text held out from training: {held_out["longest_run"]}; {held_out["share_of_8_grams"]:.0%})

{textwrap.indent(chr(10).join(shown), "  | ")}

  model     {MODEL}/
  sample    {RESULTS}/sample/samples.txt
  figures   {RESULTS}/evaluate/metrics.json, {RESULTS}/train/history.csv; as charts: dvc plots show
  runs      {"mlflow.db" if here else place}

  next      source .venv/bin/activate
            git add dvc.lock && git commit -am "a first run"    what experiments are compared with
            dvc exp run -S model.n_embd=512                     train a wider one, as an experiment
            dvc exp show --only-changed                         compare them
            {"make ui" if here else elsewhere:<51} the same on a page, with curves
            make shakespeare                                    a larger text, a longer training
""")


def _json(name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise errors.UserError(f"{RESULTS / name}: no such file; `dvc repro` makes it") from None
    return loaded


if __name__ == "__main__":
    errors.run(main)
