"""The whole pipeline, killed at random moments of every stage: `dvc repro` always ends with the same results.

`make torture` kills 100 times; the slow tests kill once in each stage.
"""

import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import threading
import time

import pytest
from helpers.trainings import LONG, environment
from helpers.workspace import FULL, command, make_repository
from mlflow import MlflowClient

KILLS = 100 if FULL else 4
STAGES = ("prepare", "train", "evaluate", "sample")
MEASURED = {"train_seconds", "chars_per_second", "model_gflops"}
"""Metrics of a training that depend on the machine's speed."""


class Pipeline:
    """A run of `dvc repro` in its own process group. ``started`` has the time at which each stage began."""

    def __init__(self, folder):
        self.lines, self.started = [], {}
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            ["dvc", "repro"], cwd=folder, env=environment(PYTHONUNBUFFERED="1"), start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                if found := re.match(r"Running stage '(\w+)'", line):
                    self.started[found[1]] = time.monotonic()
                self._changed.notify_all()
        with self._changed:
            self.ended = time.monotonic()
            self._changed.notify_all()

    def reach(self, stage):
        """Wait until a stage begins. Return False if the pipeline ends without it."""
        with self._changed:
            self._changed.wait_for(lambda: stage in self.started or hasattr(self, "ended"), timeout=300)
            return stage in self.started

    def kill(self):
        """Kill DVC and the stage. Return the stage that had begun last, or None if the pipeline had ended."""
        alive = self.process.poll() is None
        if alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.finish()
        return max(self.started, key=self.started.get, default=None) if alive else None

    def finish(self):
        """Wait for the end, and return the output."""
        self._reader.join(timeout=600)
        assert not self._reader.is_alive(), "the pipeline does not end:\n" + "".join(self.lines)
        self.process.wait()
        return "".join(self.lines)

    def durations(self):
        """Return the seconds from the beginning of each stage to that of the next one."""
        times = [*self.started.values(), self.ended]
        return dict(zip(self.started, (end - start for start, end in itertools.pairwise(times)), strict=True))


def results(folder):
    """Return the digest of each output of the pipeline, without the run's name and the machine's speed."""
    found = {}
    for path in sorted(file for top in ("data/prepared", "models", "results") for file in (folder / top).rglob("*")):
        name, content = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""
        if name in ("results/train/metrics.json", "results/evaluate/scores.json"):
            metrics = {key: value for key, value in json.loads(content).items() if key not in MEASURED}
            content = json.dumps(metrics).encode()
        elif name == "results/sample/page.html":
            content = re.sub(rb'"(run|name|commit|date|train_seconds)": ?("[^"]*"|[\d.]+)|<title>.*', b"", content)
        if name not in ("results/train/run.json", "results/train/metrics.csv"):  # the run, and times
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def has_finished(folder):
    """Return whether the training has ended and removed its checkpoints. Until DVC records it, it would start again."""
    return (folder / "results/train/run.json").exists() and not any((folder / ".checkpoints").glob("*/run.json"))


def check(folder, printed, trainings):
    """Check that only the results are left, and that each of the trainings, of at most this number, is one run."""
    assert "Traceback" not in printed, printed
    assert "up to date" in command("dvc", "status", *STAGES, cwd=folder).stdout
    assert not list(folder.glob("**/*.tmp"))
    assert not list((folder / ".checkpoints").iterdir())
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])
    assert len(runs) <= trainings
    assert {run.info.status for run in runs} == {"FINISHED"}
    key = json.loads((folder / "results/train/run.json").read_text())["run"]
    (run,) = (run for run in runs if run.data.tags["minigpt.run"] == key)
    assert {"loss/val", "results/val_loss", "results/longest_copied_run"} <= run.data.metrics.keys()


@pytest.mark.slow
def test_results_are_equal_after_random_kills_in_all_stages(tmp_path, project_files):
    def repository(name):
        return make_repository(tmp_path / name, project_files, LONG)

    undisturbed = Pipeline(repository("undisturbed"))
    printed = undisturbed.finish()
    assert undisturbed.process.returncode == 0, printed
    expected, durations = results(tmp_path / "undisturbed"), undisturbed.durations()
    assert {"models/gpt/model.safetensors", "results/sample/samples.txt"} <= expected.keys()
    rng, kills, pipelines = random.Random(0), dict.fromkeys(STAGES, 0), 0
    while sum(kills.values()) < KILLS or not min(kills.values()):
        folder, trainings = repository(str(pipelines)), 1
        for stage in STAGES:
            pipeline = Pipeline(folder)
            if pipeline.reach(stage):
                time.sleep(rng.random() * durations[stage])
            if killed := pipeline.kill():
                kills[killed] += 1
                trainings += killed == "train" and has_finished(folder)
        last = Pipeline(folder)
        printed = last.finish()
        if "RWLock-file '.dvc/tmp/rwlock'" in printed:  # DVC was killed while it wrote this file, which is not atomic
            (folder / ".dvc/tmp/rwlock").unlink()
            last = Pipeline(folder)
            printed = last.finish()
        assert last.process.returncode == 0, printed
        assert results(folder) == expected, printed
        check(folder, printed, trainings)
        pipelines += 1
        print(f"{sum(kills.values())} kills in {pipelines} pipelines, all with equal results: {kills}", flush=True)
