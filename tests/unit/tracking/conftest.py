"""Fixtures of the tracking tests."""

import os

import pytest

from minigpt.tracking import uploader


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Return an empty workspace, which is the current directory, with no tracking variables set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uploader, "RETRY_DELAY", 0)
    yield tmp_path
    for name in list(os.environ):  # the store sets variables for MLflow
        if name.startswith("MLFLOW_"):
            del os.environ[name]
