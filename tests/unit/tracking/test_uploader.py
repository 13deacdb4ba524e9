"""Tests of uploads to real stores: files, servers of two ages, and servers that fail."""

import json
import math
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import requests
from helpers.servers import MLFLOW_2_7_1, TOKEN, Proxy, environment, mlflow_server
from helpers.tracking import SEND, SYNC, check_store, find_run, list_artifacts, write_run
from helpers.workspace import FULL, ROOT
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from minigpt.errors import UserError
from minigpt.tracking import store, uploader
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import Store, describe_error
from minigpt.tracking.uploader import Uploader


def test_repeated_sends_deliver_each_record_once():
    journal = write_run()
    uri = store.resolve_tracking_uri()
    sender = Uploader(uri)
    sender.send(journal)
    check_store(uri)
    next(journal.folder.glob("sent-*.json")).unlink()  # as after a crash before any progress was saved
    sender.send(journal)
    Uploader(uri).send(journal)
    check_store(uri)
    for step in range(2500, 2503):
        journal.metrics(step, {"val_loss": 0.5})
    sender.send(journal)
    assert sender.missing(journal) == 0


def test_sync_sends_the_rest_to_any_store(here, monkeypatch):
    write_run()
    log, sent = Store.log, []

    def failing(self, *arguments):
        if len(sent) == 5:
            raise ConnectionError("gone")
        sent.append(arguments)
        log(self, *arguments)

    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(Store, "log", failing)
        Uploader(store.resolve_tracking_uri()).send(Journal("a" * 32))
    assert uploader.sync() == 1
    check_store(store.resolve_tracking_uri())
    other = f"sqlite:///{here}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert uploader.sync() == 1
    check_store(other)
    Path("other.db").unlink()
    assert uploader.sync() == 1  # a store that was emptied receives everything again
    check_store(other)


def test_lost_response_of_a_store_of_files_duplicates_nothing(here, monkeypatch):
    """A database rejects a repeated metric, but a file would contain it twice."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(here / "mlruns"))
    write_run(steps=600)
    log = Store.log

    def losing(self, run_id, journal, records, *arguments):
        log(self, run_id, journal, records, *arguments)
        if records[0]["kind"] == "metrics":
            raise ConnectionError("lost")

    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(Store, "log", losing)
        Uploader(store.resolve_tracking_uri()).send(Journal("a" * 32))
    assert uploader.sync() == 1
    check_store(store.resolve_tracking_uri())


def test_journal_is_on_the_disk_before_its_records_are_sent(here, monkeypatch):
    events, flush, log = [], Journal.flush, Store.log
    monkeypatch.setattr(Journal, "flush", lambda journal: (events.append("flush"), flush(journal)))
    monkeypatch.setattr(Store, "log", lambda *arguments: (events.append("log"), log(*arguments)))
    journal = write_run(steps=3)
    events.clear()
    Uploader(store.resolve_tracking_uri()).send(journal)
    assert events[0] == "flush"
    assert set(events[1:]) == {"log"}


def test_empty_name_of_an_experiment_is_the_default(monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    write_run(steps=3)
    assert uploader.sync() == 1
    client, run = find_run(store.resolve_tracking_uri())
    assert client.get_experiment(run.info.experiment_id).name == "minigpt"


def test_run_deleted_in_the_store_stays_deleted():
    journal = write_run(steps=3)
    uploader.sync()
    client, run = find_run(store.resolve_tracking_uri())
    client.delete_run(run.info.run_id)
    journal.tags({"later": "yes"})
    assert uploader.sync() == uploader.sync() == 1
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
    assert not client.search_runs([run.info.experiment_id])


@pytest.mark.slow
def test_deleted_experiment_is_reported_and_other_runs_are_sent(server, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    name, keys = f"of {uuid.uuid4().hex}", [uuid.uuid4().hex for _ in range(2)]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    write_run(keys[0], steps=3)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    write_run(keys[1], steps=3)
    client = MlflowClient(server)
    number = client.create_experiment(name)
    client.delete_experiment(number)
    message = f"'{name}' was deleted there; restore it with `mlflow experiments restore .* {number}`"
    with pytest.raises(UserError, match=message):
        uploader.sync()
    check_store(server, keys[1])
    client.restore_experiment(number)
    assert uploader.sync() == 2
    assert client.search_runs([number])[0].info.status == "FINISHED"


def test_nan_and_infinity_arrive_once(server, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    journal = Journal(uuid.uuid4().hex)
    journal.name("a run")
    values = [float("nan"), float("inf"), float("-inf"), 1e300, 0.0]
    for step, value in enumerate(values):
        journal.metrics(step, {"val_loss": value})
    uploader.sync()
    next(journal.folder.glob("sent-*.json")).unlink()
    uploader.sync()
    client, run = find_run(server, journal.key)
    stored = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "val_loss"))
    assert len(stored) == len(values)
    assert math.isnan(stored[0][1])
    assert stored[1][1] > 1e308  # a database cannot store infinity
    assert [value for _, value in stored[3:]] == values[3:]


@pytest.mark.slow
def test_concurrent_syncs_send_each_record_once(current_server, here, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", current_server)
    key = uuid.uuid4().hex
    write_run(key, steps=1200)
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", SYNC], cwd=here, env=variables) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    check_store(current_server, key)


def test_offline_runs_reach_dagshub_after_it_is_configured(server, here, monkeypatch):
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


FAULTS = {
    "hang": "request timed out",
    "drop": "connection aborted",
    "lose": "connection aborted",
    401: "HTTP status 401: wrong token or password",
    404: "HTTP status 404",
    500: "HTTP status 500",
}
"""Faults of a server, and the errors that they cause."""


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f == "lose" else pytest.mark.slow) for f in FAULTS])
def test_sync_repairs_the_store_after_a_fault(current_server, logged_in, monkeypatch, fault):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2" if fault == "hang" else "60")
    with Proxy({"": current_server}) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        for after in range(11) if FULL else (2 + list(FAULTS).index(fault),):
            key = uuid.uuid4().hex
            write_run(key, steps=600)
            proxy.fault, proxy.after = fault, after
            with pytest.raises(MlflowException) as failure:
                Uploader(proxy.url).send(Journal(key))
            assert describe_error(failure.value) == FAULTS[fault]
            proxy.fault = None
            uploader.sync()
            check_store(current_server, key)
            print(f"{fault} after {after} requests: the store equals the journal")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drop", "lose", 500, "kill"] if FULL else ["lose", "kill"])
def test_interrupted_artifact_upload_is_completed_by_sync(server, here, logged_in, monkeypatch, fault):
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
        """Return the bytes of an artifact in the store."""
        folder = run.info.artifact_uri.removeprefix("mlflow-artifacts:")
        return requests.get(f"{server}/api/2.0/mlflow-artifacts/artifacts{folder}/{name}", auth=(TOKEN, TOKEN)).content

    with Proxy({"": server}) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        proxy.fault, proxy.after, proxy.during = "hang" if fault == "kill" else fault, 3, "mlflow-artifacts/artifacts"
        sender = subprocess.Popen(
            [sys.executable, "-c", SEND, key], cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if fault == "kill":
            while len([path for method, path in proxy.requests if method == "PUT"]) < 3 + uploader.PARALLEL_UPLOADS:
                assert sender.poll() is None
                time.sleep(0.05)
            sender.kill()
        assert sender.wait() != 0
        missing = Uploader(proxy.url).missing(journal)
        assert 1 < missing <= len(files)
        _, run = find_run(server, key)
        for record in journal.records("artifact")[: len(files) + 1 - missing]:  # records that count as sent
            assert content(record["path"]) == files[record["path"]]
        proxy.fault, before = None, len(proxy.requests)
        uploader.sync()
        assert len([path for method, path in proxy.requests[before:] if method == "PUT"]) == missing - 1  # each once
    _, run = find_run(server, key)
    stored = [name for part in (0, 1) for name, _ in list_artifacts(server, run.info.run_id, f"folder/part{part}")]
    assert sorted(stored) == sorted(files)
    assert {name: content(name) for name in stored} == files
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite:///store.db", "./mlruns"])
def test_lost_response_duplicates_nothing(tmp_path, logged_in, monkeypatch, backend):
    with (
        mlflow_server(environment(*MLFLOW_2_7_1), tmp_path / "server", backend) as url,
        Proxy({"": url}) as proxy,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        write_run(steps=900)
        proxy.fault, proxy.during = "lose", "log-batch"
        with pytest.raises(UserError, match=r"run aaaaaaaa was not sent to .*: connection aborted"):
            uploader.sync()
        proxy.during = "runs/create"
        write_run("b" * 32, steps=3)
        uploader.sync()  # the retry finds the run that the first request created
        check_store(url)
        check_store(url, "b" * 32)
        journal, sender = Journal("a" * 32), Uploader(proxy.url)
        sender.send(journal, check=True)
        progress = next(journal.folder.glob("sent-*.json"))
        progress.write_bytes(b"")  # another sender was killed while it saved its progress
        journal.metrics(900, {"val_loss": 1.0})
        sender.send(journal)
        check_store(url)
        # An earlier version was killed between a request and its response.
        progress.write_text(json.dumps({"store": url, "next": 0, "doubtful": journal.size}))
        sender.send(journal)
        check_store(url)
