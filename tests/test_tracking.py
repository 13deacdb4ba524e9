"""Journals, and what arrives of them in real stores: files, servers of two ages, and servers that fail."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import requests
from conftest import ROOT, make_workspace, python, set_params
from mlflow import MlflowClient
from servers import MLFLOW_2_7_1, TOKEN, Proxy, environment, free_port, mlflow_server

from minigpt import tracking
from minigpt.errors import UserError
from minigpt.journal import Journal
from minigpt.tracking import Mirror, Tracker

FULL = os.environ.get("TORTURE") == "full"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty workspace, with no tracking variables set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: None)  # between the tries of a sync
    yield tmp_path
    for name in list(os.environ):  # what the tracking itself has set
        if name.startswith("MLFLOW_"):
            del os.environ[name]


@pytest.fixture(scope="session")
def current_server(tmp_path_factory):
    """The address of a real MLflow server with basic authentication."""
    with mlflow_server(sys.executable, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="session")
def old_server(tmp_path_factory):
    with mlflow_server(environment(*MLFLOW_2_7_1), tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(params=["current_server", "old_server"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", TOKEN)


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
    mirror = Mirror(tracking.store())
    mirror.send(journal)
    check_store(tracking.store())
    next(journal.folder.glob("sent-*.json")).unlink()  # as if a crash had come before anything was counted
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
    Path("other.db").unlink()
    assert tracking.sync() == 1  # a store that has lost everything gets everything again
    check_store(other)


def test_where_runs_go(here, monkeypatch):
    assert tracking.store() == f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/main/workspace")
    assert tracking.store() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_REPO", "user/repo")
    assert tracking.store() == "sqlite:////main/workspace/mlflow.db"
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "secret-token")
    assert tracking.store() == "https://dagshub.com/user/repo.mlflow"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret-token"
    monkeypatch.setenv("DAGSHUB_CLIENT_HOST", "http://127.0.0.1:8080/")
    assert tracking.store() == "http://127.0.0.1:8080/user/repo.mlflow"
    monkeypatch.setenv("DAGSHUB_REPO", "https://dagshub.com/user/repo")
    with pytest.raises(UserError, match="DAGSHUB_REPO: expected user/repo, got 'https://dagshub"):
        tracking.store()


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
    assert tracking.store() == place


def test_credentials_leave_the_address_before_anybody_prints_it(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s%40cret@mlflow.example.com/runs")
    assert tracking.store() == tracking.store() == "https://mlflow.example.com/runs"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s@cret"
    assert "s@cret" not in tracking.reason(ConnectionError("no answer to s@cret\nand more"))


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
    assert [record["values"] for record in Journal("b" * 32).records()] == [{"a": "1"}, {"b": "2"}, {"c": "3"}]


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
    client, run = in_store(tracking.store(), "d" * 32)
    assert run.data.params["sample.temperature"] == "0.8"  # MLflow's params never change
    assert run.data.tags["sample.temperature"] == "0.5"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "sample.loss")] == [0.8, 0.5]
    assert "sample is part of run dddddddd, 'a run', in sqlite:///" in capsys.readouterr().out


def test_experiments_that_share_a_training_are_all_named_in_its_run(here, monkeypatch):
    for name in ("first", "second", "first"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        Tracker("d" * 32).stage("sample", {}, {})
    assert in_store(tracking.store(), "d" * 32)[1].data.tags["dvc.experiment"] == "first, second"


def test_a_training_that_is_on_record_elsewhere_is_added_to(here, monkeypatch, capsys):
    key = "f" * 32
    write_run(key, steps=3)
    tracking.sync()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store())
    monkeypatch.setenv("DVC_ROOT", str(here / "clone"))  # has the model, by dvc pull, but not the journal
    Tracker(key).stage("evaluate", {}, {"loss": 1.5})
    assert "it was trained elsewhere" in capsys.readouterr().out
    _, run = in_store(tracking.store(), key)
    assert run.info.run_name == "a run"
    assert run.data.metrics.keys() == {"train_loss", "val_loss", "evaluate.loss"}
    assert "restored" not in run.data.tags
    Tracker("9" * 32).stage("evaluate", {}, {"loss": 1.5})
    _, run = in_store(tracking.store(), "9" * 32)
    assert run.data.tags["restored"].startswith("DVC restored the training")


def test_a_run_that_was_deleted_in_the_store_stays_deleted(here):
    journal = write_run(steps=3)
    tracking.sync()
    client, run = in_store(tracking.store())
    client.delete_run(run.info.run_id)
    journal.tags({"later": "yes"})
    assert tracking.sync() == tracking.sync() == 1
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
    assert not client.search_runs([run.info.experiment_id])


def test_clients_that_start_at_once_share_one_store(here):
    code = (
        "import sys; from minigpt.journal import Journal; from minigpt.tracking import Mirror, store\n"
        "journal = Journal(sys.argv[1] * 32); journal.name('a run'); Mirror(store()).send(journal)"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, key], cwd=here, env=variables) for key in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    for key in "ab":
        in_store(tracking.store(), key * 32)


def test_a_server_with_authentication_gets_everything(server, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    key = uuid.uuid4().hex
    write_run(key, steps=1200)
    tracking.sync()
    check_store(server, key)
    tracker = Tracker(key)
    tracker.stage("evaluate", {"evaluate.stride": 0}, {"loss": 1.5})
    check_store(server, key)


def test_runs_made_offline_go_to_a_dagshub_that_is_configured_later(server, here, monkeypatch):
    key = uuid.uuid4().hex
    write_run(key, steps=20)
    assert tracking.store() == f"sqlite:///{here}/mlflow.db"
    tracking.sync()
    with Proxy({"/user/repo.mlflow": server}) as dagshub:
        monkeypatch.setenv("DAGSHUB_CLIENT_HOST", dagshub.url)
        monkeypatch.setenv("DAGSHUB_REPO", "user/repo")
        monkeypatch.setenv("DAGSHUB_USER_TOKEN", TOKEN)
        tracking.sync()
        check_store(f"{dagshub.url}/user/repo.mlflow", key)
        before = len(dagshub.requests)
        tracking.sync()
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
            write_run(key, steps=1200)
            proxy.fault, proxy.after = fault, after
            with pytest.raises(Exception, match=r"."):
                Mirror(proxy.url).send(Journal(key))
            proxy.fault = None
            tracking.sync()
            check_store(current_server, key)


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
            tracking.sync()
        proxy.during = "runs/create"
        write_run("b" * 32, steps=3)
        tracking.sync()  # the second try finds the run that the first has made
        check_store(url)
        check_store(url, "b" * 32)


def test_a_server_that_never_answers_is_waited_for_once(here, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
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
    assert "not all was taken within 0.5 seconds; `python -m minigpt.tracking sync` sends them" in told[0]


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
    """Prints the seconds that a stage spends inside its tracker, over 50 evaluations and the end."""
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
        print(f"{fault}: {time.perf_counter() - began:.2f} s in all")
        assert tracker._sender.patience >= 0
        assert Mirror(uri).missing(tracker.journal) == 52


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
