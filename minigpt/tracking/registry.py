"""Registration of a run's packaged model in MLflow's model registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import describe_error, http_status, resolve_tracking_uri
from minigpt.tracking.uploader import SYNC_TIMEOUT, Uploader

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "minigpt"
ABSENT = (404, 405, 501)  # HTTP statuses of servers without a registry, or without aliases


def register(key: str, alias: str = "") -> str:
    """Register the model of the run ``key`` as a new version of MODEL_NAME, and give it an alias.

    A run that has a version keeps it. Missing records of the run are sent first.

    Returns:
        the address of the version for MLflow, such as ``models:/minigpt/3`` or ``models:/minigpt@champion``.

    Raises:
        UserError: the store does not have the run or its model, or has no model registry.
    """
    journal, uploader = Journal(key), Uploader(resolve_tracking_uri(), SYNC_TIMEOUT)
    place = uploader.display_uri
    try:
        if journal.records():
            uploader.send(journal, check=True)
        run = uploader.store.find_run(journal)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: cannot read the run {key[:8]}: {describe_error(error)}") from None
    if run is None or run.info.lifecycle_stage == "deleted":
        raise UserError(f"{place}: has no run {key[:8]}; train the model again, or choose the store that has its run")
    if "mlflow.log-model.history" not in run.data.tags:
        raise UserError(f"{place}: run {key[:8]} has no packaged model; train it again with `dvc repro --force train`")
    try:
        version = _version(uploader.store.connect(), run)
        if alias:
            uploader.store.connect().set_registered_model_alias(MODEL_NAME, alias, version)
    except Exception as error:
        if http_status(error) in ABSENT:
            advice = "set MINIGPT_TRACKING=local, or MLFLOW_TRACKING_URI to a server that has one"
            raise UserError(f"{place}: has no model registry of MLflow; {advice}") from None
        raise UserError(f"{place}: cannot register the model: {describe_error(error)}") from None
    return f"models:/{MODEL_NAME}@{alias}" if alias else f"models:/{MODEL_NAME}/{version}"


def _version(client: MlflowClient, run: Any) -> str:
    """Return the version of a run's model. Create it, and the registered model, if they are missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{MODEL_NAME}'"):
        if version.run_id == run.info.run_id:
            return str(version.version)
    created = client.create_model_version(MODEL_NAME, f"{run.info.artifact_uri}/model", run.info.run_id)
    return str(created.version)
