"""Fixtures of the tracking tests."""

import os
import shutil

import pytest
from mlflow import MlflowClient

from minigpt.tracking import uploader


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The database of a store without runs. MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, empty_store):
    """Return a workspace with an empty store. It is the current directory, and no tracking variables are set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_")):
            monkeypatch.delenv(name)
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uploader, "RETRY_DELAY", 0)
    yield tmp_path
    for name in list(os.environ):  # the store sets variables for MLflow
        if name.startswith("MLFLOW_"):
            del os.environ[name]


@pytest.fixture
def repository(here):
    """Return the workspace as the root of a repository, as commands require."""
    (here / ".dvc").mkdir()
    return here
