"""Tests of the registration of models."""

import uuid

import pytest
from helpers.servers import Proxy
from helpers.tracking import find_run, write_run
from mlflow import MlflowClient

from minigpt.errors import UserError
from minigpt.tracking import store, uploader
from minigpt.tracking.registry import register


@pytest.fixture
def key():
    """The key of a run with a package."""
    key = uuid.uuid4().hex
    journal = write_run(key, steps=2)
    (journal.folder / "model").mkdir()
    (journal.folder / "model/MLmodel").write_text("flavors: {}\n")
    journal.artifact(journal.folder / "model")
    journal.tags({"mlflow.log-model.history": '[{"artifact_path": "model", "flavors": {}}]'})
    return key


def check_registration(uri, key):
    """Register a run twice, and check that it is one version with an alias."""
    assert register(key, "champion") == "models:/minigpt@champion"
    client, run = find_run(uri, key)
    version = client.get_model_version_by_alias("minigpt", "champion")
    assert (version.run_id, version.source) == (run.info.run_id, f"{run.info.artifact_uri}/model")
    assert register(key) == f"models:/minigpt/{version.version}"


def test_model_gets_one_version_and_an_alias(key):
    check_registration(store.resolve_tracking_uri(), key)


def test_alias_moves_to_a_later_model(key):
    register(key, "champion")
    later = write_run("b" * 32, steps=2)
    later.tags({"mlflow.log-model.history": '[{"artifact_path": "model", "flavors": {}}]'})
    register("b" * 32, "champion")
    client = MlflowClient(store.resolve_tracking_uri())
    assert client.get_model_version_by_alias("minigpt", "champion").version == 2


def test_run_without_a_package_or_without_records_is_reported():
    write_run("c" * 32, steps=2)
    with pytest.raises(UserError, match="run cccccccc has no packaged model; train it again"):
        register("c" * 32)
    with pytest.raises(UserError, match="has no run dddddddd"):
        register("d" * 32)


@pytest.mark.slow
def test_servers_with_a_registry_have_the_model(server, logged_in, monkeypatch, key):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    check_registration(server, key)


@pytest.mark.slow
def test_server_without_a_registry_is_one_clear_sentence(current_server, logged_in, monkeypatch, key):
    with Proxy({"": current_server}) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        uploader.sync()
        proxy.fault, proxy.during = 404, "registered-models"
        with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+: has no model registry of MLflow; set MINIGPT_TRACKING"):
            register(key)
