"""Folders with the results of experiments, without training a model."""

import numpy as np
import yaml

from helpers.workspace import ROOT, overlay
from minigpt.evaluation import paired
from minigpt.evaluation.character_losses import LossRecorder
from minigpt.files import write_csv, write_json
from minigpt.params import load


def results_folder(folder, nats, text="text", seed=None, **sections):
    """Write the results of a model with these losses per character, and params with changes."""
    tree = overlay(load(ROOT / "params.yaml").model_dump(), sections)
    if seed is not None:
        tree["train"]["seed"] = seed
    for stage in ("train", "evaluate"):
        (folder / "results" / stage).mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    recorder = LossRecorder(len(nats))
    recorder.extend(np.asarray(nats, np.float64))
    losses = recorder.result(text)
    losses.save(folder / "results/evaluate")
    loss = paired.loss(losses)
    val = {"loss": loss.value, "standard_error": loss.standard_error, "characters": len(nats)}
    write_json(folder / "results/evaluate/metrics.json", {"val": val, "train": {"loss": loss.value - 0.1}})
    metrics = {"best_step": 50, "parameters": 11500, "train_seconds": 12.5}
    write_json(folder / "results/train/metrics.json", metrics)
    write_json(folder / "results/train/run.json", {"run": f"{len(str(folder)):032x}", "name": f"run of {folder.name}"})
    history = [{"step": step, "train_loss": 3 - step / 50, "val_loss": 3.1 - step / 50} for step in (0, 25, 50)]
    write_csv(folder / "results/train/history.csv", history)
    return folder


def two_losses(characters=6000, difference=-0.02):
    """Return losses of two models on one text; the second differs by ``difference`` on average, and by noise."""
    random = np.random.default_rng(0)
    first = random.exponential(1.5, characters)
    return first, first + difference + random.normal(0, 0.05, characters)
