import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from mlflow import MlflowClient

from minigpt import tracking
from minigpt.tracking import Journal, Mirror, Tracker


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty workspace, with no tracking variables set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(key="a" * 32):
    """A journal with one record of each kind."""
    journal = Journal(key)
    journal.name("a run")
    journal.params({"model.n_embd": 128, "sample.prompts": ["\n"] * 300})
    journal.tags({"git": "none"})
    journal.dataset("songs.txt", "data/songs.txt", "d" * 64, {"train": 90, "val": 10})
    journal.status("RUNNING")
    for step in range(2500):
        journal.metrics(step, {"train_loss": 1 / (step + 1), "val_loss": 2 / (step + 1)})
    (journal.folder / "notes.txt").write_text("text")
    journal.artifact(journal.folder / "notes.txt", "sample")
    journal.status("FINISHED")
    return journal


def in_store(uri, key="a" * 32):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("minigpt")
    runs = client.search_runs([experiment.experiment_id], f"tags.`minigpt.run` = '{key}'")
    assert len(runs) == 1
    return client, runs[0]


def check_store(uri, key="a" * 32):
    client, run = in_store(uri, key)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params["model.n_embd"] == "128"
    assert run.data.tags["git"] == "none"
    assert run.inputs.dataset_inputs[0].dataset.name == "songs.txt"
    history = client.get_metric_history(run.info.run_id, "val_loss")
    assert sorted(metric.step for metric in history) == list(range(2500))
    assert {metric.step: metric.value for metric in history} == {step: 2 / (step + 1) for step in range(2500)}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "sample")] == ["sample/notes.txt"]


def test_a_journal_arrives_whole_and_once_however_often_it_is_sent(here):
    journal = write_run()
    mirror = Mirror(tracking.store())
    mirror.send(journal)
    check_store(tracking.store())
    (journal.folder / "sent.json").unlink()  # as if a crash had come before anything was counted
    mirror.send(journal)
    Mirror(tracking.store()).send(journal)
    check_store(tracking.store())


def test_sync_sends_what_an_interruption_left_to_any_store(here, monkeypatch):
    write_run()
    whole, sent = Mirror._send, []

    def failing(self, *arguments):
        if len(sent) == 5:
            raise ConnectionError("gone")
        sent.append(arguments)
        whole(self, *arguments)

    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(Mirror, "_send", failing)
        Mirror(tracking.store()).send(Journal("a" * 32))
    assert tracking.sync() == 1
    check_store(tracking.store())
    other = f"sqlite:///{here}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert tracking.sync() == 1
    check_store(other)


def test_where_runs_go(here, monkeypatch):
    assert tracking.store() == f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/main/workspace")
    assert tracking.store() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_REPO", "user/repo")
    assert tracking.store() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-token")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert tracking.store() == "https://dagshub.com/user/repo.mlflow"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-token"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.store() == "http://127.0.0.1:5000"


def test_a_resumed_training_says_nothing_twice(here):
    for _ in range(2):
        journal = Journal("b" * 32)
        for step in (0, 5, 10):
            journal.metrics(step, {"val_loss": step})
    assert [record["step"] for record in Journal("b" * 32).records()] == [0, 5, 10]


def test_a_line_cut_short_is_left_out_and_written_after(here):
    journal = Journal("b" * 32)
    journal.tags({"a": "1"})
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "tags", "val')
    assert len(journal.records()) == 1
    Journal("b" * 32).tags({"b": "2"})
    assert [record["values"] for record in Journal("b" * 32).records()] == [{"a": "1"}, {"b": "2"}]


def test_a_store_that_is_away_costs_a_line_and_little_time(here, monkeypatch, capsys):
    with socket.socket() as hanging:  # accepts, and never answers
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hanging.getsockname()[1]}")
        tracker = Tracker("c" * 32)
        tracker.journal.name("a run")
        began = time.monotonic()
        for _ in range(3):
            tracker.mirror()
        waited = time.monotonic() - began
    printed = capsys.readouterr().err
    assert printed.count("not tracked in") == 1
    assert "python -m minigpt.tracking sync" in printed
    assert len(tracker.journal.records()) == 1
    assert waited < 30  # MLflow's own limits would make it minutes


def test_later_stages_add_to_the_run_and_may_be_run_again(here):
    tracker = Tracker("d" * 32)
    tracker.journal.name("a run")
    for value in (0.8, 0.5):
        tracker.stage("sample", {"sample.temperature": value}, {"loss": value})
    client, run = in_store(tracking.store(), "d" * 32)
    assert run.data.params["sample.temperature"] == "0.8"  # MLflow's params never change
    assert run.data.tags["sample.temperature"] == "0.5"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "sample.loss")] == [0.8, 0.5]


def test_clients_that_start_at_once_share_one_store(here):
    code = (
        "import sys; from minigpt.tracking import Journal, Mirror, store\n"
        "journal = Journal(sys.argv[1] * 32); journal.name('a run'); Mirror(store()).send(journal)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, key], cwd=here, env=environment) for key in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    for key in "ab":
        in_store(tracking.store(), key * 32)


def test_the_journal_is_lines_of_json(here):
    journal = write_run()
    lines = (journal.folder / "journal.jsonl").read_text().splitlines()
    assert all({"kind", "time"} <= set(json.loads(line)) for line in lines)
