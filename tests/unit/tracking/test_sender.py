"""Tests of the process that sends records."""

import json
import os
import socket
import threading

import pytest
from helpers.servers import TOKEN, Proxy
from helpers.tracking import check_store, write_run
from helpers.workspace import ROOT, python
from mlflow import MlflowClient

from minigpt.tracking import sender, store
from minigpt.tracking.run import Tracker
from minigpt.tracking.sender import SendError, start_sender

KEY, OTHER_KEY = "a" * 32, "b" * 32
STAGE = """if True:
    import sys
    from minigpt.tracking.run import Tracker
    from minigpt.tracking.sender import start_sender
    sender = start_sender()
    tracker = Tracker(sys.argv[1], sender=sender)
    tracker.journal.name("a run")
    for step in range(5):
        tracker.metrics(step, {"val_loss": 1.0})
        tracker.upload()
    tracker.end("FINISHED", [])
    print("mlflow" in sys.modules, sender.process.pid)
"""


@pytest.fixture
def start(here, monkeypatch):
    """Function that starts or joins the process, as a stage of DVC does; at the end, all of them are left."""
    monkeypatch.setenv("DVC_STAGE", "train")
    started = []

    def start():
        started.append(start_sender())
        return started[-1]

    yield start
    for process in started:
        process.close()


def send(process, key):
    """Write records of a run with this key, and send them."""
    process.send(write_run(key, steps=3), lambda: None)


@pytest.mark.slow
def test_stage_does_not_import_mlflow_and_its_records_are_in_the_store(here):
    ran = python("-c", STAGE, KEY, cwd=here, PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout.split()[0], ran.stderr) == (0, "False", "")
    check_store(store.resolve_tracking_uri(), KEY)


@pytest.mark.slow
def test_error_of_the_server_is_reported_without_secrets(here):
    with Proxy({}) as proxy:
        proxy.fault = 401
        logged_in = {"MLFLOW_TRACKING_USERNAME": TOKEN, "MLFLOW_TRACKING_PASSWORD": TOKEN}
        ran = python("-c", STAGE, KEY, cwd=here, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=proxy.url, **logged_in)
    assert ran.returncode == 0
    assert "HTTP status 401: wrong token or password; run `minigpt sync` to send them" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert TOKEN not in ran.stderr


def test_stage_continues_after_its_sender_was_killed(start, capsys):
    process = start()
    tracker = Tracker(KEY, sender=process)
    process.process.kill()
    for step in range(3):
        tracker.metrics(step, {"val_loss": 1.0})
        tracker.upload()
    tracker.end("FINISHED", [])
    problem = "the process that sends the records has ended"
    assert f"{problem}; run `minigpt sync` to send them" in capsys.readouterr().err.splitlines()[-1]


def test_last_words_of_a_sender_are_the_reason(start):
    process = start()
    assert process.ready.wait(timeout=60)
    sender.log_path(sender.socket_path()).write_text("a warning\nIllegal instruction\n")
    process.process.kill()
    with pytest.raises(SendError, match=r"has ended: Illegal instruction$"):
        send(process, KEY)


def test_sender_ends_with_a_stage_that_dvc_did_not_start(start, monkeypatch):
    monkeypatch.delenv("DVC_STAGE")
    process = start()
    process.close()
    assert process.process.wait(timeout=60) == 0
    assert process.ready.wait(timeout=5)


@pytest.mark.slow
def test_next_stage_joins_the_sender_and_its_records_are_in_the_store(start):
    first = start()
    send(first, KEY)
    first.close()
    second = start()
    assert second.process is None
    send(second, OTHER_KEY)
    for key in (KEY, OTHER_KEY):
        check_store(store.resolve_tracking_uri(), key)


def test_unused_sender_ends_and_removes_its_socket(start, monkeypatch):
    monkeypatch.setattr(sender, "LINGER", 0.2)
    process = start()
    path = sender.socket_path()
    assert path.is_socket()
    process.close()
    assert process.process.wait(timeout=60) == 0
    assert not list(path.parent.glob(f"{path.name}*"))


def test_unused_sender_ends_after_dvc_has_deleted_the_copy_in_which_an_experiment_ran(start, here, monkeypatch):
    monkeypatch.setattr(sender, "LINGER", 0.2)
    monkeypatch.setenv("DVC_ROOT", str(here))
    (here / "copy").mkdir()
    monkeypatch.chdir(here / "copy")
    process, path = start(), sender.socket_path()
    assert process.ready.wait(timeout=60)
    monkeypatch.chdir(here)
    (here / "copy").rmdir()
    process.close()
    assert process.process.wait(timeout=60) == 0
    assert not list(path.parent.glob(f"{path.name}*"))


def test_stage_with_another_environment_has_a_sender_of_its_own(start, monkeypatch):
    first = start()
    monkeypatch.setenv("DVC_EXP_NAME", "another-experiment")
    assert start().process is None
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", TOKEN)
    assert start().process.pid != first.process.pid


def test_token_that_was_corrected_has_a_sender_of_its_own(start, here, monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)  # they are set, and unset after the test
    monkeypatch.setenv("DAGSHUB_REPO", "someone/minigpt")
    monkeypatch.setenv("DAGSHUB_CLIENT_TOKENS_CACHE", str(here / "tokens"))
    token = {"token_type": "app-token", "access_token": "expired"}
    (here / "tokens").write_text(json.dumps({"https://dagshub.com": [token]}))
    first = start()
    assert start().process is None
    (here / "tokens").write_text(json.dumps({"https://dagshub.com": [token | {"access_token": "valid"}]}))
    assert start().process.pid != first.process.pid


def test_invalid_address_of_a_store_is_reported_and_nothing_waits(start, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:mlflow.db")
    process = start()
    assert process.ready.wait(timeout=60)
    with pytest.raises(SendError, match="Could not parse"):
        send(process, KEY)


@pytest.mark.slow
def test_database_that_was_replaced_gets_a_sender_of_its_own(start, here):
    first = start()
    send(first, KEY)
    (here / "mlflow.db").unlink()
    second = start()
    send(second, OTHER_KEY)
    assert second.process.pid != first.process.pid
    check_store(store.resolve_tracking_uri(), OTHER_KEY)


def test_remains_of_a_killed_sender_are_replaced(start):
    first = start()
    first.process.kill()
    first.process.wait()
    assert start().process.pid != first.process.pid


@pytest.mark.slow
def test_stage_that_gives_up_a_request_ends_it(start, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        process = start()
        failures = []

        def fail():
            with pytest.raises(SendError) as raised:
                send(process, KEY)
            failures.append(str(raised.value))

        sending = threading.Thread(target=fail)
        sending.start()
        silent.settimeout(60)
        accepted, _ = silent.accept()
        process.close()
        assert process.process.wait(timeout=sender.LINGER / 2) == 0
        accepted.close()
        sending.join()
    assert failures == ["the process that sends the records has ended"]


@pytest.mark.slow
def test_reader_of_a_stage_does_not_wait_for_the_sender(here):
    ran = python("-c", STAGE, KEY, cwd=here, PYTHONPATH=str(ROOT), DVC_STAGE="train")
    os.kill(int(ran.stdout.split()[1]), 0)  # raises an error unless it still runs
    assert ran.stderr == ""


@pytest.mark.slow
def test_message_of_the_sender_is_written_by_the_stage(start, capsys):
    process = start()
    send(process, KEY)
    client = MlflowClient(store.resolve_tracking_uri())
    (run,) = client.search_runs(["0", "1"])
    client.delete_run(run.info.run_id)
    send(start(), KEY)
    assert "run aaaaaaaa was deleted in sqlite:" in capsys.readouterr().err
