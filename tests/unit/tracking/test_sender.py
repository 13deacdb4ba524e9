"""Tests of the process that sends records."""

import pytest
from helpers.servers import TOKEN, Proxy
from helpers.tracking import check_store
from helpers.workspace import ROOT, python

from minigpt.tracking import store
from minigpt.tracking.run import Tracker
from minigpt.tracking.sender import Sender

KEY = "a" * 32
STAGE = """if True:
    import sys
    from minigpt.tracking.run import Tracker
    from minigpt.tracking.sender import start_sender
    tracker = Tracker(sys.argv[1], sender=start_sender())
    tracker.journal.name("a run")
    for step in range(5):
        tracker.metrics(step, {"val_loss": 1.0})
        tracker.upload()
    tracker.end("FINISHED", [])
    print("mlflow" in sys.modules)
"""


@pytest.mark.slow
def test_stage_does_not_import_mlflow_and_its_records_are_in_the_store(here):
    ran = python("-c", STAGE, KEY, cwd=here, PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "False\n", "")
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


def test_stage_continues_after_its_sender_was_killed(here, capsys):
    sender = Sender()
    tracker = Tracker(KEY, sender=sender)
    sender.stop()
    for step in range(3):
        tracker.metrics(step, {"val_loss": 1.0})
        tracker.upload()
    tracker.end("FINISHED", [])
    problem = "the process that sends the records has ended"
    assert f"{problem}; run `minigpt sync` to send them" in capsys.readouterr().err.splitlines()[-1]


def test_sender_ends_with_the_stage(here):
    sender = Sender()
    sender._process.stdin.close()
    assert sender._process.wait(timeout=60) == 0
    assert sender.ready.wait(timeout=5)
