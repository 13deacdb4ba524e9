"""Tests of background uploads: how long stages wait for servers that fail."""

import os
import time
import uuid

import pytest
from helpers.servers import Proxy, free_port
from helpers.tracking import check_store
from helpers.workspace import ROOT, python

from minigpt.tracking import background
from minigpt.tracking.journal import Journal
from minigpt.tracking.run import Tracker
from minigpt.tracking.uploader import Uploader

FULL = os.environ.get("TORTURE") == "full"
WAITED_FOR = ("hang", "slow")
"""Faults that a stage notices only by waiting."""


def test_unresponsive_server_is_waited_for_once(monkeypatch, capsys):
    monkeypatch.setattr(background, "MAX_WAIT", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    with Proxy({}) as proxy:
        proxy.fault = "hang"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        tracker = Tracker("c" * 32)
        for step in range(50):
            tracker.metrics(step, {"val_loss": step})
            tracker.upload()
        assert capsys.readouterr().err == ""
        tracker.end("FINISHED", [])
        # The first request is still unanswered, so only `end` can have waited.
        assert len(proxy.requests) == 1
        assert tracker._background.remaining_wait == 0
        tracker.end("FINISHED", [])
        assert len(proxy.requests) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert "51 records of run cccccccc are not in http://127.0.0.1" in printed[0]
    assert "the upload did not finish within 0.5 seconds; run `minigpt sync` to send them" in printed[0]


@pytest.mark.slow
def test_next_stage_does_not_wait_for_an_unreachable_server(current_server, here, logged_in, monkeypatch):
    key, printed = uuid.uuid4().hex, []
    code = (
        "import sys; from minigpt.tracking import background, run; background.MAX_WAIT = 0.5\n"
        "tracker = run.Tracker(sys.argv[1]); tracker.upload(); tracker.stage(sys.argv[2], {}, {'loss': 1.0})"
    )
    with Proxy({"": current_server}) as proxy:
        proxy.fault = "hang"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        Journal(key).name("a run")
        for name in ("train", "evaluate", "sample"):
            ran = python("-c", code, key, name, cwd=here, PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=proxy.url)
            assert ran.returncode == 0, ran.stderr
            printed.append(ran.stderr)
        assert [text.count("`minigpt sync`") for text in printed] == [1, 1, 1]
        assert "the upload did not finish within 0.5 seconds" in printed[0]
        assert all("the server was unreachable a moment ago; not retrying yet" in text for text in printed[1:])

        proxy.fault = None
        tracker = Tracker(key)
        assert tracker._background.remaining_wait == background.SHORT_WAIT
        tracker.upload()
        while tracker._background.remaining_wait == background.SHORT_WAIT:  # until the server accepts a record
            time.sleep(0.01)
        check_store(current_server, key)
        assert Tracker(key)._background.remaining_wait == background.MAX_WAIT


FAULTS = [
    "refuse",
    "hang",
    pytest.param("slow", marks=pytest.mark.slow),
    *(["drop", "lose", 401, 404, 500] if FULL else []),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_only_unresponsive_servers_use_up_the_wait(logged_in, monkeypatch, request, fault):
    """Prints the seconds that the stages spend in their trackers, over 50 evaluations and three ends."""
    with Proxy({"": request.getfixturevalue("current_server") if fault == "lose" else ""}) as proxy:
        proxy.fault = fault
        uri = f"http://127.0.0.1:{free_port()}" if fault == "refuse" else proxy.url
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker("c" * 32)
        tracker.journal.name("a run")
        began = time.perf_counter()
        for step in range(50):
            tracker.metrics(step, {"val_loss": step})
            tracker.upload()
        tracker.end("FINISHED", [])
        spent = [time.perf_counter() - began]
        assert (tracker._background.remaining_wait == 0) == (fault in WAITED_FOR)
        assert Uploader(uri).missing(tracker.journal) == 52
        for name in ("evaluate", "sample"):
            began = time.perf_counter()
            later = Tracker("c" * 32)
            if fault in WAITED_FOR:
                assert later._background.remaining_wait == background.SHORT_WAIT
            later.upload()
            later.stage(name, {}, {"loss": 1.0})
            spent.append(time.perf_counter() - began)
        assert Uploader(uri).missing(tracker.journal) > 52
        print(f"{fault}: train {spent[0]:.2f} s, evaluate {spent[1]:.2f} s, sample {spent[2]:.2f} s")
