"""Tests of trainings that are killed, or stopped before their first checkpoint or after their last step."""

import csv
import os
import signal
import sys

import pytest
from helpers.trainings import prepare, saved_checkpoints, start, start_training, wait_for
from helpers.workspace import FULL
from mlflow import MlflowClient


def runs(folder):
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])


def train_after_a_kill(folder, moment):
    """Kill a training once a condition is true, and train again. Return the output of the second training."""
    process = start_training(folder)
    assert wait_for(moment, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = start_training(folder)
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    return printed


def test_killed_training_resumes_from_its_last_checkpoint(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files, {"train": {"max_iters": 100}})
    printed = train_after_a_kill(folder, lambda: saved_checkpoints(folder))
    assert "resuming after step" in printed
    (run,) = runs(folder)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"] if FULL else ["SIGTERM"])
def test_signal_after_the_last_step_keeps_the_training_and_its_run(tmp_path, project_files, name):
    folder = prepare(tmp_path / "work", project_files)
    process = start_training(folder)
    assert wait_for((folder / "models/gpt").exists, process), process.communicate()[0]
    process.send_signal(getattr(signal, name))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name), printed
    assert f"minigpt: stopped by {name}; run the same command to resume\n" in printed
    assert "Traceback" not in printed
    (run,) = runs(folder)
    assert run.info.status == "KILLED"
    again = start_training(folder)
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert "resuming after step 300, from" in printed
    (same,) = runs(folder)
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    assert not list((folder / ".checkpoints").iterdir())


@pytest.mark.slow
def test_signal_in_the_last_evaluation_stops_the_stage(tmp_path, project_files):
    """The handler of the training loop receives it, after the last step that reads the requests."""
    folder = prepare(tmp_path / "work", project_files, {"train": {"max_iters": 3, "eval_interval": 3}})
    code = (
        "import os, signal, sys\n"
        "from minigpt import program\n"
        "from minigpt.training.trainer import Trainer\n"
        "from stages import train\n"
        "evaluate = Trainer.evaluate\n"
        "def interrupt(self, step):\n"
        "    evaluate(self, step)\n"
        "    if step == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "Trainer.evaluate = interrupt\n"
        "program.run(train.main)"
    )
    process = start(sys.executable, "-c", code, cwd=folder)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "stopped by SIGINT; saved after step 3; run the same command to resume" in printed
    assert not (folder / "models/gpt").exists()


@pytest.mark.slow
def test_start_after_a_kill_before_the_first_checkpoint_says_so(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files)
    printed = train_after_a_kill(folder, lambda: list((folder / ".checkpoints").glob("*/run.json")))
    assert "starting from step 0: the earlier start ended before its first checkpoint" in printed


@pytest.mark.slow
def test_history_grows_while_a_training_runs(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files)
    history, metrics = folder / "results/train/history.csv", folder / "results/train/metrics.json"
    process = start_training(folder)
    rows = lambda: len(history.read_text().splitlines()) - 1 if history.exists() else 0  # noqa: E731
    for count in (1, 2):
        assert wait_for(lambda count=count: rows() >= count, process), process.communicate()[0]
        assert not metrics.exists()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert rows() == 7
    curves = list(csv.DictReader((folder / "results/train/metrics.csv").open()))
    assert list(curves[0]) == ["Name", "Value", "Timestamp", "Step"]
    assert len([row for row in curves if row["Name"] == "loss/val"]) == 7
