"""Trainings in separate processes, for tests that stop them and compare their results."""

import csv
import hashlib
import os
import subprocess
import sys
import time

from helpers.workspace import make_workspace, python, search_path, set_params

LONG = {"train": {"max_iters": 300, "eval_interval": 50}}
"""Params of a training that is long enough to be stopped halfway."""


def prepare(folder, project_files, *changes):
    """Make a workspace and run the stage prepare in it."""
    make_workspace(folder, project_files)
    set_params(folder, LONG, *changes)
    ran = python("-m", "stages.prepare", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def environment(**variables):
    """Return this environment without tracking and DVC, for trainings that save checkpoints often."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_"))}
    return kept | {
        "PATH": search_path(),
        "MINIGPT_CHECKPOINT_SECONDS": "0.1",
        "MINIGPT_CPU": "off",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def start(*arguments, cwd, **variables):
    """Start a program in its own process group."""
    return subprocess.Popen(
        arguments, cwd=cwd, env=environment(**variables), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_training(folder, **variables):
    return start(sys.executable, "-m", "stages.train", cwd=folder, **variables)


def trained_result(folder):
    """Return the digest of the trained weights, and the history."""
    weights = hashlib.sha256((folder / "models/gpt/model.safetensors").read_bytes()).hexdigest()
    with (folder / "results/train/history.csv").open() as file:
        return weights, list(csv.DictReader(file))


def saved_checkpoints(folder):
    """Return a file of each complete checkpoint, in the order of their steps."""
    return sorted((folder / ".checkpoints").glob("*/step-*/digests.json"))


def wait_for(condition, process, seconds=120):
    """Wait until a condition is true. Return False if the process ends first or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True
