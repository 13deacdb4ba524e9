"""Journals, and what arrives of them in real stores: files, servers of two ages, and servers that fail."""

import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
import requests
import torch
from helpers.servers import MLFLOW_2_7_1, TOKEN, Proxy, environment, free_port, mlflow_server
from helpers.workspace import ROOT, command, make_repository, make_workspace, python, set_params
from mlflow import MlflowClient

from minigpt.errors import UserError
from minigpt.params import flatten, load
from minigpt.tracking import background, store, uploader
from minigpt.tracking.journal import Journal
from minigpt.tracking.run import Tracker
from minigpt.tracking.uploader import Uploader

FULL = os.environ.get("TORTURE") == "full"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty workspace, with no tracking variables set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uploader, "PAUSE", 0)  # between the tries of a sync
    yield tmp_path
    for name in list(os.environ):  # what the tracking itself has set
        if name.startswith("MLFLOW_"):
            del os.environ[name]


def write_run(key="a" * 32, steps=2500):
    """A journal with one record of each kind."""
    journal = Journal(key)
    journal.name("a run")
    journal.params({"model.n_embd": 128, "sample.prompts": ["\n"] * 300})
    journal.tags({"git": "none"})
    journal.dataset("songs.txt", "data/songs.txt", "d" * 64, {"train": 90, "val": 10})
    journal.status("RUNNING")
    for step in range(steps):
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


def listed(uri, run_id, folder):
    """Paths and sizes of a run's artifacts; the client of today cannot list those of an old server."""
    folder = "" if folder == "." else folder
    if uri.startswith("sqlite:"):
        return {(file.path, file.file_size) for file in MlflowClient(uri).list_artifacts(run_id, folder)}
    answer = requests.get(
        f"{uri}/api/2.0/mlflow/artifacts/list", {"run_id": run_id, "path": folder}, auth=(TOKEN, TOKEN), timeout=30
    )
    return {(file["path"], int(file.get("file_size", 0))) for file in answer.json()["files"]}


def check_store(uri, key="a" * 32):
    """The store holds what the journal does: all of it, once."""
    client, run = in_store(uri, key)
    journal = Journal(key)
    assert run.info.run_name == journal.records("name")[0]["name"]
    assert run.info.status == journal.records("status")[-1]["status"]
    for record in journal.records("params"):
        assert record["values"].items() <= run.data.params.items()
    for record in journal.records("tags"):
        assert record["values"].keys() <= run.data.tags.keys()
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == [r["name"] for r in journal.records("dataset")]
    written = {}
    for record in journal.records("metrics"):
        for name, value in record["values"].items():
            written.setdefault(name, []).append((record["step"], record["time"], value))
    assert set(run.data.metrics) == set(written)
    for name, points in written.items():
        stored = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert sorted(stored) == sorted(points), name
    for record in journal.records("artifact"):
        path = Path(record["path"])
        size = (journal.folder / "artifacts" / path).stat().st_size
        assert (record["path"], size) in listed(uri, run.info.run_id, path.parent.as_posix())


def test_a_journal_arrives_whole_and_once_however_often_it_is_sent(here):
    journal = write_run()
    mirror = Uploader(store.resolve_tracking_uri())
    mirror.send(journal)
    check_store(store.resolve_tracking_uri())
    next(journal.folder.glob("sent-*.json")).unlink()  # as if a crash had come before anything was counted
    mirror.send(journal)
    Uploader(store.resolve_tracking_uri()).send(journal)
    check_store(store.resolve_tracking_uri())


def test_sync_sends_what_an_interruption_left_to_any_store(here, monkeypatch):
    write_run()
    whole, sent = Uploader._send, []

    def failing(self, *arguments):
        if len(sent) == 5:
            raise ConnectionError("gone")
        sent.append(arguments)
        whole(self, *arguments)

    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(Uploader, "_send", failing)
        Uploader(store.resolve_tracking_uri()).send(Journal("a" * 32))
    assert uploader.sync() == 1
    check_store(store.resolve_tracking_uri())
    other = f"sqlite:///{here}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert uploader.sync() == 1
    check_store(other)
    Path("other.db").unlink()
    assert uploader.sync() == 1  # a store that has lost everything gets everything again
    check_store(other)


def test_where_runs_go(here, monkeypatch):
    assert store.resolve_tracking_uri() == f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/main/workspace")
    assert store.resolve_tracking_uri() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_REPO", "user/repo")
    assert store.resolve_tracking_uri() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-token")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of-another-server")
    assert store.resolve_tracking_uri() == "https://dagshub.com/user/repo.mlflow"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-token"
    monkeypatch.setenv("DAGSHUB_CLIENT_HOST", "http://127.0.0.1:8080/")
    assert store.resolve_tracking_uri() == "http://127.0.0.1:8080/user/repo.mlflow"
    monkeypatch.setenv("DAGSHUB_REPO", "https://dagshub.com/user/repo")
    with pytest.raises(UserError, match="DAGSHUB_REPO: expected user/repo, got 'https://dagshub"):
        store.resolve_tracking_uri()


@pytest.mark.parametrize(
    "uri, place",
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:///runs.db", "sqlite:////main/workspace/runs.db"),
        ("sqlite:////tmp/runs.db", "sqlite:////tmp/runs.db"),
        ("file:mlruns", "/main/workspace/mlruns"),
        ("./mlruns", "/main/workspace/mlruns"),
        ("databricks", "databricks"),
    ],
)
def test_a_relative_store_is_the_main_workspaces(here, monkeypatch, uri, place):
    monkeypatch.setenv("DVC_ROOT", "/main/workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store.resolve_tracking_uri() == place


def test_credentials_leave_the_address_before_anybody_prints_it(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s%40cret@mlflow.example.com/runs")
    assert store.resolve_tracking_uri() == store.resolve_tracking_uri() == "https://mlflow.example.com/runs"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s@cret"
    assert Uploader("postgresql://me:s%40cret@db.example.com/runs").place == "postgresql://db.example.com/runs"
    assert "s@cret" not in store.reason(ConnectionError("no answer to s@cret\nand more"))


def test_a_resumed_training_says_nothing_twice(here):
    for _ in range(2):
        journal = Journal("b" * 32)
        for step in (0, 5, 10):
            journal.metrics(step, {"val_loss": step})
    assert [record["step"] for record in Journal("b" * 32).records()] == [0, 5, 10]


def test_an_artifact_is_recorded_again_only_if_it_has_changed(here):
    journal = Journal("b" * 32)
    (here / "model/code").mkdir(parents=True)
    (here / "model/MLmodel").write_text("one")
    (here / "model/code/a.py").write_text("pass")
    for _ in range(2):
        journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()] == ["model/MLmodel", "model/code/a.py"]
    (here / "model/MLmodel").write_text("two")
    journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()][2:] == ["model/MLmodel"]
    (here / "model/MLmodel").write_text("three")
    (journal.folder / "artifacts/model/MLmodel").write_text("three")  # kept, and killed before it was recorded
    journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()][3:] == ["model/MLmodel"]


def test_a_line_cut_short_is_left_out_and_written_after(here):
    journal = Journal("b" * 32)
    journal.tags({"a": "1"})
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "tags", "val')
    assert len(journal.records()) == 1
    Journal("b" * 32).tags({"b": "2"})
    with (journal.folder / "journal.jsonl").open("ab") as file:
        file.write(b"\0\0\xff\n")
    journal.tags({"c": "3"})
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "tags"')  # what a full disk leaves to the same process
    journal.tags({"d": "4"})
    assert [record["values"] for record in Journal("b" * 32).records()] == [
        {n: v} for n, v in zip("abcd", "1234", strict=True)
    ]


def test_the_journal_is_lines_of_json(here):
    journal = write_run(steps=10)
    lines = (journal.folder / "journal.jsonl").read_text().splitlines()
    assert all({"kind", "time"} <= set(json.loads(line)) for line in lines)


def test_several_may_write_one_journal_at_once(here):
    def write(name):
        journal = Journal("e" * 32)
        for number in range(100):
            journal.tags({name: str(number) * 50})

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (Journal("e" * 32).folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["tags"] * 400


def test_later_stages_add_to_the_run_and_may_be_run_again(here, capsys):
    tracker = Tracker("d" * 32)
    tracker.journal.name("a run")
    for value in (0.8, 0.5):
        tracker.stage("sample", {"sample.temperature": value}, {"loss": value})
    client, run = in_store(store.resolve_tracking_uri(), "d" * 32)
    assert run.data.params["sample.temperature"] == "0.8"  # MLflow's params never change
    assert run.data.tags["sample.temperature"] == "0.5"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "sample.loss")] == [0.8, 0.5]
    assert "sample is part of run dddddddd, 'a run', in sqlite:///" in capsys.readouterr().out


def test_experiments_that_share_a_training_are_all_named_in_its_run(here, monkeypatch):
    for name in ("first", "second", "first"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        Tracker("d" * 32).stage("sample", {}, {})
    assert in_store(store.resolve_tracking_uri(), "d" * 32)[1].data.tags["dvc.experiment"] == "first, second"


def test_a_training_that_is_on_record_elsewhere_is_added_to(here, monkeypatch, capsys):
    key = "f" * 32
    write_run(key, steps=3)
    uploader.sync()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.resolve_tracking_uri())
    monkeypatch.setenv("DVC_ROOT", str(here / "clone"))  # has the model, by dvc pull, but not the journal
    Tracker(key).stage("evaluate", {}, {"loss": 1.5})
    assert "it was trained elsewhere" in capsys.readouterr().out
    _, run = in_store(store.resolve_tracking_uri(), key)
    assert run.info.run_name == "a run"
    assert run.data.metrics.keys() == {"train_loss", "val_loss", "evaluate.loss"}
    assert "restored" not in run.data.tags
    Tracker("9" * 32).stage("evaluate", {}, {"loss": 1.5})
    _, run = in_store(store.resolve_tracking_uri(), "9" * 32)
    assert run.data.tags["restored"].startswith("DVC restored the training")


def test_a_run_that_was_deleted_in_the_store_stays_deleted(here):
    journal = write_run(steps=3)
    uploader.sync()
    client, run = in_store(store.resolve_tracking_uri())
    client.delete_run(run.info.run_id)
    journal.tags({"later": "yes"})
    assert uploader.sync() == uploader.sync() == 1
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
    assert not client.search_runs([run.info.experiment_id])


def test_a_run_deleted_while_it_is_trained_stays_deleted(here, capsys):
    tracker = Tracker("d" * 32)
    tracker.journal.name("a run")
    tracker.mirror()
    client, run = in_store(store.resolve_tracking_uri(), "d" * 32)
    client.delete_run(run.info.run_id)
    tracker.metrics(1, {"val_loss": 2.0})
    tracker.mirror()
    tracker.end("FINISHED", [])
    assert not client.search_runs([run.info.experiment_id])
    assert "was deleted there: nothing more is sent" in capsys.readouterr().out


def test_an_experiment_deleted_in_the_store_is_named_and_holds_up_no_other(server, here, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    name, keys = f"of {uuid.uuid4().hex}", [uuid.uuid4().hex for _ in range(2)]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    write_run(keys[0], steps=3)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    write_run(keys[1], steps=3)
    client = MlflowClient(server)
    number = client.create_experiment(name)
    client.delete_experiment(number)
    with pytest.raises(UserError, match=f"'{name}' was deleted there; `mlflow experiments restore .* {number}`"):
        uploader.sync()
    check_store(server, keys[1])
    client.restore_experiment(number)
    assert uploader.sync() == 2
    assert client.search_runs([number])[0].info.status == "FINISHED"


def test_numbers_that_are_none_arrive_once(server, here, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    journal = Journal(uuid.uuid4().hex)
    journal.name("a run")
    values = [float("nan"), float("inf"), float("-inf"), 1e300, 0.0]
    for step, value in enumerate(values):
        journal.metrics(step, {"val_loss": value})
    uploader.sync()
    next(journal.folder.glob("sent-*.json")).unlink()
    uploader.sync()
    client, run = in_store(server, journal.key)
    stored = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "val_loss"))
    assert len(stored) == len(values)
    assert math.isnan(stored[0][1])
    assert stored[1][1] > 1e308  # a database has no infinity
    assert [value for _, value in stored[3:]] == values[3:]


def test_two_that_sync_at_once_send_each_record_once(current_server, here, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", current_server)
    key = uuid.uuid4().hex
    write_run(key, steps=1200)
    sync = [sys.executable, "-m", "minigpt.tracking", "sync"]
    started = [subprocess.Popen(sync, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    check_store(current_server, key)


def test_the_load_goes_on_whatever_the_clock_does(here, monkeypatch):
    tracker = Tracker("d" * 32)
    with monkeypatch.context() as ahead:
        ahead.setattr("minigpt.journal.time.time", lambda: 4e9)
        tracker.journal.metrics(100, {"system/cpu_utilization_percentage": 50.0})
    tracker._watch(torch.device("cpu"))
    tracker._monitor.stop()
    assert [record["step"] for record in tracker.journal.records()] == [100, 101]


def test_clients_that_start_at_once_share_one_store(here):
    code = (
        "import sys; from minigpt.tracking.journal import Journal\n"
        "from minigpt.tracking.uploader import Uploader, resolve_tracking_uri\n"
        "journal = Journal(sys.argv[1] * 32); journal.name('a run'); Uploader(resolve_tracking_uri()).send(journal)"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, key], cwd=here, env=variables) for key in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    for key in "ab":
        in_store(store.resolve_tracking_uri(), key * 32)


def test_a_server_with_authentication_gets_everything(server, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    key = uuid.uuid4().hex
    write_run(key, steps=1200)
    uploader.sync()
    check_store(server, key)
    tracker = Tracker(key)
    tracker.stage("evaluate", {"evaluate.stride": 0}, {"loss": 1.5})
    check_store(server, key)


def test_runs_made_offline_go_to_a_dagshub_that_is_configured_later(server, here, monkeypatch):
    key = uuid.uuid4().hex
    write_run(key, steps=20)
    assert store.resolve_tracking_uri() == f"sqlite:///{here}/mlflow.db"
    uploader.sync()
    with Proxy({"/user/repo.mlflow": server}) as dagshub:
        monkeypatch.setenv("DAGSHUB_CLIENT_HOST", dagshub.url)
        monkeypatch.setenv("DAGSHUB_REPO", "user/repo")
        monkeypatch.setenv("DAGSHUB_USER_TOKEN", TOKEN)
        uploader.sync()
        check_store(f"{dagshub.url}/user/repo.mlflow", key)
        before = len(dagshub.requests)
        uploader.sync()
        assert {method for method, _ in dagshub.requests[before:]} <= {"GET", "POST"}
        assert not [path for _, path in dagshub.requests[before:] if "log" in path or "create" in path]
    for path in (here / ".journal").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


FAULTS = ["hang", "drop", "lose", 401, 404, 500]


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_anywhere_sync_makes_the_store_equal_the_journal(current_server, logged_in, monkeypatch, fault):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with Proxy({"": current_server}) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        for after in range(11) if FULL else (2 + FAULTS.index(fault),):
            key = uuid.uuid4().hex
            write_run(key, steps=600)
            proxy.fault, proxy.after = fault, after
            with pytest.raises(Exception, match=r"."):
                Uploader(proxy.url).send(Journal(key))
            proxy.fault = None
            uploader.sync()
            check_store(current_server, key)
            print(f"{fault} after {after} requests: the store equals the journal")


@pytest.mark.parametrize("fault", ["drop", "lose", 500, "kill"] if FULL else ["lose", "kill"])
def test_a_folder_broken_off_in_the_middle_is_whole_after_a_sync(server, here, logged_in, monkeypatch, fault):
    key, files = uuid.uuid4().hex, {}
    for number in range(12):
        path = here / f"folder/part{number % 2}/{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2000 + number))
        files[str(path.relative_to(here))] = path.read_bytes()
    journal = Journal(key)
    journal.name("a run")
    journal.artifact(here / "folder")
    journal.status("FINISHED")

    def content(name):
        """What the store has of a file of the run."""
        folder = run.info.artifact_uri.removeprefix("mlflow-artifacts:")
        return requests.get(f"{server}/api/2.0/mlflow-artifacts/artifacts{folder}/{name}", auth=(TOKEN, TOKEN)).content

    with Proxy({"": server}) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        proxy.fault, proxy.after, proxy.during = "hang" if fault == "kill" else fault, 3, "mlflow-artifacts/artifacts"
        code = (
            "import sys; from minigpt.tracking.journal import Journal\n"
            "from minigpt.tracking.uploader import Uploader, resolve_tracking_uri\n"
        )
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        sender = subprocess.Popen(
            [sys.executable, "-c", f"{code}Uploader(resolve_tracking_uri()).send(Journal(sys.argv[1]))", key],
            cwd=here, env=variables, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if fault == "kill":
            while len([path for method, path in proxy.requests if method == "PUT"]) < 3 + uploader.UPLOADS:
                assert sender.poll() is None
                time.sleep(0.05)
            sender.kill()
        assert sender.wait() != 0
        left = Uploader(proxy.url).missing(journal)
        assert 1 < left <= len(files)
        _, run = in_store(server, key)
        for record in journal.records("artifact")[: len(files) + 1 - left]:  # what counts as sent was sent
            assert content(record["path"]) == files[record["path"]]
        proxy.fault, before = None, len(proxy.requests)
        uploader.sync()
        assert len([path for method, path in proxy.requests[before:] if method == "PUT"]) == left - 1  # each once
    _, run = in_store(server, key)
    there = [name for part in (0, 1) for name, _ in listed(server, run.info.run_id, f"folder/part{part}")]
    assert sorted(there) == sorted(files)
    assert {name: content(name) for name in there} == files
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("backend", ["sqlite:///store.db", "./mlruns"])
def test_a_lost_answer_doubles_nothing_even_in_a_store_that_would(tmp_path, logged_in, monkeypatch, backend):
    with (
        mlflow_server(environment(*MLFLOW_2_7_1), tmp_path / "server", backend) as url,
        Proxy({"": url}) as proxy,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        write_run(steps=900)
        proxy.fault, proxy.during = "lose", "log-batch"
        with pytest.raises(UserError, match="could not be sent"):
            uploader.sync()
        proxy.during = "runs/create"
        write_run("b" * 32, steps=3)
        uploader.sync()  # the second try finds the run that the first has made
        check_store(url)
        check_store(url, "b" * 32)
        journal, mirror = Journal("a" * 32), Uploader(proxy.url)
        mirror.send(journal, check=True)
        next(journal.folder.glob("sent-*.json")).write_bytes(b"")  # another that sends was killed while it noted this
        journal.metrics(900, {"val_loss": 1.0})
        mirror.send(journal)
        check_store(url)


def test_a_server_that_never_answers_is_waited_for_once(here, monkeypatch, capsys):
    monkeypatch.setattr(uploader, "PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    with Proxy({}) as proxy:
        proxy.fault = "hang"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        tracker = Tracker("c" * 32)
        for step in range(50):
            tracker.metrics(step, {"val_loss": step})
            tracker.mirror()
        assert capsys.readouterr().err == ""
        tracker.end("FINISHED", [])
        # All this while the first request stands unanswered: nothing but `end` can have waited.
        assert len(proxy.requests) == 1
        assert tracker._sender.patience == 0
        tracker.end("FINISHED", [])
        assert len(proxy.requests) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "51 records of run cccccccc are not in http://127.0.0.1" in told[0]
    assert "not all was taken within 0.5 seconds; `minigpt sync` sends them" in told[0]


def test_a_server_waited_for_in_vain_is_not_waited_for_by_the_next_stage(current_server, here, logged_in, monkeypatch):
    key, told = uuid.uuid4().hex, []
    code = (
        "import sys; from minigpt import tracking; background.PATIENCE = 0.5; tracker = run.Tracker(sys.argv[1])\n"
        "tracker.mirror(); tracker.stage(sys.argv[2], {}, {'loss': 1.0})"
    )
    with Proxy({"": current_server}) as proxy:
        proxy.fault = "hang"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        Journal(key).name("a run")
        for name in ("train", "evaluate", "sample"):
            ran = python("-c", code, key, name, cwd=here, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=proxy.url)
            assert ran.returncode == 0, ran.stderr
            told.append(ran.stderr)
        assert [text.count("minigpt.tracking sync") for text in told] == [1, 1, 1]
        assert "not all was taken within 0.5 seconds" in told[0]
        assert all("it was away a moment ago, and is not waited for again so soon" in text for text in told[1:])

        proxy.fault = None
        back = Tracker(key)
        assert back._sender.patience == background.BRIEF
        back.mirror()
        while back._sender.patience == background.BRIEF:  # what it has taken gives it credit again
            time.sleep(0.01)
        check_store(current_server, key)
        assert Tracker(key)._sender.patience == background.PATIENCE


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, project_files):
    """A workspace in which the first stage has been run."""
    folder = make_workspace(tmp_path_factory.mktemp("prepared") / "work", project_files)
    set_params(folder, {"train": {"max_iters": 200, "eval_interval": 20}})
    ran = python("-m", "stages.prepare", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def train(folder, uri, **variables):
    """Train in ``folder``; gives what was printed on standard error, and the digest of the weights."""
    ran = python(
        "-m", "stages.train", cwd=folder, MLFLOW_TRACKING_URI=uri,
        MLFLOW_TRACKING_USERNAME=TOKEN, MLFLOW_TRACKING_PASSWORD=TOKEN, **variables,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    weights = hashlib.sha256((folder / "models/gpt/model.safetensors").read_bytes()).hexdigest()
    return ran.stderr, weights


@pytest.mark.parametrize("fault", ["refuse", *FAULTS, "slow"] if FULL else ["refuse", "hang", "slow"])
def test_what_a_fault_costs(here, logged_in, monkeypatch, request, fault):
    """Prints the seconds that the stages spend inside their trackers, over 50 evaluations and three ends."""
    with Proxy({"": request.getfixturevalue("current_server") if fault == "lose" else ""}) as proxy:
        proxy.fault = fault
        uri = f"http://127.0.0.1:{free_port()}" if fault == "refuse" else proxy.url
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker("c" * 32)
        tracker.journal.name("a run")
        began = time.perf_counter()
        for step in range(50):
            tracker.metrics(step, {"val_loss": step})
            tracker.mirror()
        tracker.end("FINISHED", [])
        spent = [time.perf_counter() - began]
        assert tracker._sender.patience >= 0
        assert Uploader(uri).missing(tracker.journal) == 52
        for name in ("evaluate", "sample"):
            began = time.perf_counter()
            later = Tracker("c" * 32)
            later.mirror()
            later.stage(name, {}, {"loss": 1.0})
            spent.append(time.perf_counter() - began)
        assert Uploader(uri).missing(tracker.journal) > 52
        print(f"{fault}: train {spent[0]:.2f} s, evaluate {spent[1]:.2f} s, sample {spent[2]:.2f} s")


def test_no_server_ends_or_changes_a_training(current_server, prepared, logged_in, monkeypatch):
    quiet, weights = train(prepared, current_server)
    assert "minigpt:" not in quiet or "not all was taken" in quiet
    for fault, after in [
        ("drop", 6), *([("refuse", 0), ("hang", 0), ("hang", 8), ("lose", 7), (401, 0), (500, 9)] if FULL else []),
    ]:  # fmt: skip
        with Proxy({"": current_server}) as proxy:
            proxy.fault, proxy.after = fault, after
            uri = f"http://127.0.0.1:{free_port()}" if fault == "refuse" else proxy.url
            printed, same = train(prepared, uri)
            assert same == weights
            told = [line for line in printed.splitlines() if line.startswith("minigpt:")]
            assert len([line for line in told if "does not take the run" in line]) <= 1, printed
            assert len([line for line in told if "minigpt.tracking sync" in line]) == 1, printed
            assert len(told) <= 2, printed
            assert "Traceback" not in printed
            assert TOKEN not in printed
            key = json.loads((prepared / "results/train/run.json").read_text())["run"]
            proxy.fault = None
            sent = python(
                "-m", "minigpt.tracking", "sync", cwd=prepared, MLFLOW_TRACKING_URI=current_server,
                MLFLOW_TRACKING_USERNAME=TOKEN, MLFLOW_TRACKING_PASSWORD=TOKEN,
            )  # fmt: skip
            assert sent.returncode == 0, sent.stderr
            monkeypatch.chdir(prepared)
            check_store(current_server, key)


def stop_queue_workers(folder):
    """End those that the empty queue has not: of two that begin at once, one may lose the address it is told at."""
    for worker in psutil.process_iter(["cmdline", "cwd"]):
        if "queue-worker" in (worker.info["cmdline"] or ()) and str(worker.info["cwd"]).startswith(str(folder)):
            worker.kill()


@pytest.mark.parametrize("number", range(10 if FULL else 1))
def test_queued_experiments_are_whole_runs_in_one_store(tmp_path, project_files, monkeypatch, request, number):
    """Eight at a time by two workers, in full, and one beside them; prints how long they took."""
    folder = make_repository(tmp_path / "repository", project_files)
    seeds = [str(seed) for seed in range(9 if FULL else 3)]
    began = time.perf_counter()
    queued = command("dvc", "exp", "run", "--queue", "-S", f"train.seed={','.join(seeds[1:])}", cwd=folder)
    assert queued.returncode == 0, queued.stderr
    request.addfinalizer(lambda: stop_queue_workers(folder))
    # Not through pipes: the workers would hold them, and the command seem to last as long as they do.
    assert command("sh", "-c", "dvc queue start -j 2 > queue.log 2>&1", cwd=folder).returncode == 0
    aside = command("dvc", "exp", "run", "--temp", "-S", "train.seed=0", cwd=folder)
    assert aside.returncode == 0, aside.stdout + aside.stderr
    while re.search("Queued|Running", status := command("dvc", "queue", "status", cwd=folder).stdout):
        time.sleep(2)
    assert status.count("Success") == len(seeds) - 1, status
    shown = command("dvc", "exp", "show", "--csv", "--no-pager", cwd=folder).stdout
    experiments = {row["Experiment"]: row for row in csv.DictReader(shown.splitlines()) if row["Experiment"]}
    assert sorted(row["train.seed"] for row in experiments.values()) == seeds

    assert list(folder.rglob("mlflow.db")) == [folder / "mlflow.db"]
    monkeypatch.chdir(folder)
    client = MlflowClient(store.resolve_tracking_uri())
    runs = client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])
    assert {run.info.run_name for run in runs} == set(experiments)
    assert len(runs) == len(seeds)
    settings = load(folder / "params.yaml").model_dump()
    for run in runs:
        check_store(store.resolve_tracking_uri(), run.data.tags["minigpt.run"])
        name, row = run.info.run_name, experiments[run.info.run_name]
        assert run.data.tags["dvc.experiment"] == name
        settings["train"]["seed"] = int(row["train.seed"])
        assert run.data.params == {key: str(value) for key, value in flatten(settings).items()}
        assert run.info.status == "FINISHED"
        assert run.data.metrics["train.val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-12)
        assert run.data.metrics["evaluate.val.loss"] == pytest.approx(float(row["val.loss"]), rel=1e-12)
        assert len(client.get_metric_history(run.info.run_id, "val_loss")) == 4
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert files == {"model", "evaluate", "sample", "train", "params.yaml", "dvc.lock"}
    print(f"round {number}: {len(seeds)} whole runs of {len(seeds)}, {time.perf_counter() - began:.0f} s")
