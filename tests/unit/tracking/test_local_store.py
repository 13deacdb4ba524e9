"""Tests of local stores that cannot be opened."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest
from helpers.tracking import check_store, write_run
from helpers.workspace import FULL, ROOT

from minigpt.errors import UserError
from minigpt.tracking import store, uploader
from minigpt.tracking.run import Tracker

KEY = "a" * 32


@pytest.fixture(autouse=True)
def no_store(here):
    (here / "mlflow.db").unlink()


def make_folder(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_text(path):
    path.write_text("no database " * 200)


def make_cut_database(path):
    with sqlite3.connect(path) as database:
        database.execute("create table a (b)")
    path.write_bytes(path.read_bytes()[:600])


def make_unwritable(path):
    path.symlink_to("/proc/minigpt.db")  # not even root can make this file


DAMAGES = [make_folder, make_pipe, make_cut_database]
if FULL:
    DAMAGES += [make_device, make_text, make_unwritable]


@pytest.mark.parametrize("make", DAMAGES)
def test_stage_loses_at_most_five_seconds_to_a_store_that_cannot_be_opened(here, capsys, make):
    make(here / "mlflow.db")
    began = time.monotonic()
    tracker = Tracker(KEY)
    tracker.journal.name("a run")
    for step in range(10):
        tracker.metrics(step, {"val_loss": 1.0})
        tracker.upload()
    tracker.end("FINISHED", [])
    assert time.monotonic() - began < 5
    first, last = capsys.readouterr().err.splitlines()
    assert f"sqlite:///{here}/mlflow.db does not accept the run: {here}/mlflow.db: " in first
    assert "run `minigpt sync` to send them" in last
    with pytest.raises(UserError, match=r"mlflow\.db: "):
        uploader.sync()
    assert time.monotonic() - began < 10
    (here / "mlflow.db").rmdir() if make is make_folder else (here / "mlflow.db").unlink()
    uploader.sync()
    check_store(store.resolve_tracking_uri(), KEY)


@pytest.mark.slow
def test_stage_loses_at_most_five_seconds_to_a_locked_database(here, capsys):
    write_run(KEY, steps=3)
    uploader.sync()
    with sqlite3.connect(here / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        tracker = Tracker(KEY)
        tracker.metrics(100, {"val_loss": 1.0})
        tracker.upload()
        tracker.end("FINISHED", [])
        assert time.monotonic() - began < 5
    assert "mlflow.db: cannot write this database: database is locked" in capsys.readouterr().err
    uploader.sync()
    check_store(store.resolve_tracking_uri(), KEY)


def test_address_of_a_database_that_cannot_exist_is_reported():
    began = time.monotonic()
    for path in ("/proc/minigpt/runs.db", "/dev/null", "/dev/null%2Fruns.db", "/tmp/"):
        with pytest.raises(UserError, match=r"cannot write this database|not a database but a folder"):
            uploader.Uploader(f"sqlite:///{path}").store.connect()
    assert time.monotonic() - began < 5


def test_sync_reports_a_store_that_cannot_be_opened_in_one_line(minigpt, repository):
    for key in ("a", "b"):
        write_run(key * 32, steps=3)
    (repository / "mlflow.db").mkdir()
    began = time.monotonic()
    ran = minigpt("sync")
    assert ran.returncode == 1
    database = f"{repository}/mlflow.db"
    problem = f"{database}: not a database but a folder or device; move it out of the way"
    assert ran.stderr == f"minigpt: run aaaaaaaa and 1 more were not sent to sqlite:///{database}: {problem}\n"
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_store_is_complete_after_a_kill_during_its_creation(repository):
    write_run(KEY, steps=3)
    started = subprocess.Popen([sys.executable, "-m", "minigpt", "sync"], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (remains := list(repository.glob(".mlflow.db-*.tmp*"))):
        assert started.poll() is None
        time.sleep(0.001)
    started.kill()
    started.wait()
    assert remains
    assert not (repository / "mlflow.db").exists() or not (repository / "mlflow.db").stat().st_size
    assert uploader.sync() == 1
    check_store(store.resolve_tracking_uri(), KEY)
    assert not list(repository.glob(".mlflow.db*"))
