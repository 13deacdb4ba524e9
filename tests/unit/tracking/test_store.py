"""Tests of the tracking store: its URI, credentials, and errors."""

import os
import subprocess
import sys

import pytest
from helpers.tracking import SEND, check_store, find_run, write_run
from helpers.workspace import ROOT

from minigpt.errors import UserError
from minigpt.tracking import store
from minigpt.tracking.uploader import Uploader


def test_tracking_uri_follows_the_environment(here, monkeypatch):
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
    "uri, resolved",
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:///runs.db", "sqlite:////main/workspace/runs.db"),
        ("sqlite:////tmp/runs.db", "sqlite:////tmp/runs.db"),
        ("file:mlruns", "/main/workspace/mlruns"),
        ("./mlruns", "/main/workspace/mlruns"),
        ("databricks", "databricks"),
    ],
)
def test_relative_store_is_in_the_main_workspace(monkeypatch, uri, resolved):
    monkeypatch.setenv("DVC_ROOT", "/main/workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store.resolve_tracking_uri() == resolved


@pytest.mark.parametrize("name", ["50%20 a%2F#?b", pytest.param("?uri=true", marks=pytest.mark.slow)])
def test_store_stays_in_a_folder_with_an_odd_name(here, monkeypatch, name):
    folder = here / name / "work"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    journal = write_run(steps=2)
    Uploader(store.resolve_tracking_uri()).send(journal)
    check_store(store.resolve_tracking_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=5")
    Uploader(store.resolve_tracking_uri()).send(journal)
    check_store(store.resolve_tracking_uri())
    assert {path.name for path in folder.iterdir()} == {".journal", "mlartifacts", "mlflow.db", "other.db"}
    assert {path.name for path in here.iterdir()} == {name, "mlflow.db"}


@pytest.mark.parametrize("uri", ["http://[bad", "https://me:secret@[::1", "http://[x]/"])
def test_malformed_uri_is_one_clear_message(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: (?!.*secret).* is not the address of a server"):
        store.resolve_tracking_uri()


def test_credentials_are_never_printed(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s%40cret@mlflow.example.com/runs")
    assert store.resolve_tracking_uri() == store.resolve_tracking_uri() == "https://mlflow.example.com/runs"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s@cret"
    assert Uploader("postgresql://me:s%40cret@db.example.com/runs").display_uri == "postgresql://db.example.com/runs"
    described = store.describe_error(ConnectionError("no answer to s@cret\nand more"))
    assert described == "no answer to $MLFLOW_TRACKING_PASSWORD"


@pytest.mark.slow
def test_clients_that_start_concurrently_share_one_database(here):
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", SEND, key * 32], cwd=here, env=variables) for key in ("a", "b")
    ]  # fmt: skip
    assert [process.wait() for process in started] == [0, 0]
    for key in ("a", "b"):
        find_run(store.resolve_tracking_uri(), key * 32)
