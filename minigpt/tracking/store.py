"""The MLflow tracking store: its URI, and a client that creates runs there and fills them.

Runs go to MLFLOW_TRACKING_URI if it is set. Otherwise they go to DagsHub if a repository there and a token are found,
and to ``mlflow.db`` in the repository if not. MINIGPT_TRACKING=local overrides both.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import sqlite3
import sys
import uuid
from contextlib import closing, nullcontext
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from minigpt.errors import UserError
from minigpt.files import remove, workspace
from minigpt.tracking.credentials import configured_page, find_token
from minigpt.tracking.journal import EXPERIMENT, Journal, locked
from minigpt.tracking.masking import mask, mask_stderr

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DATABASE_WAIT = 2.0  # seconds that a stage waits for a database that another program has locked
RUN_TAG = "minigpt.run"  # MLflow tag that holds the key of a run, by which it is looked up
USER_TAG = "mlflow.user"
NOTE_TAG = "mlflow.note.content"  # the description on the page of a run, which users can edit there
RUN_ID = "$MLFLOW_RUN_ID"  # in the value of a tag: replaced by the ID that the store gives the run
NETWORK_ERRORS = {  # parts of the HTTP library's messages, and the message that is shown instead
    "Connection refused": "connection refused",
    "NameResolutionError": "unknown host",
    "timed out": "request timed out",
    "Connection aborted": "connection aborted",
}


class Store:
    """Client of one tracking store. ``timeout`` is in seconds, and is overridden by MLFLOW_HTTP_REQUEST_TIMEOUT."""

    def __init__(self, uri: str, timeout: int) -> None:
        self.uri, self.timeout = uri, timeout
        self.local = uri.startswith(("sqlite:", "sqlite+", "file:")) or ":" not in uri
        # Without credentials, safe to print. A password may contain the characters that end a user name or host.
        self.display_uri = uri if self.local else mask(re.sub("://.*@", "://", uri))
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    def check(self) -> None:
        """Raise UserError if the store is a database file that cannot be written. MLflow would retry for minutes."""
        if (path := database_path(self.uri)) is None:
            return
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a database but a folder or device; move it out of the way")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=DATABASE_WAIT)) as database:
                database.execute("BEGIN IMMEDIATE")  # takes the lock of a writer, and writes nothing
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: cannot write this database: {error}") from None

    def connect(self) -> MlflowClient:
        """Return the MLflow client. The first call imports MLflow, which takes seconds.

        It sends requests to a database, but none to a server.
        """
        if self._client is None:
            self.check()
            mask_stderr()
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self.timeout))
            # If only the response to create_run is lost, a retry inside MLflow creates a second run.
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            for verbose in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(verbose).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            if not self.uri.startswith("http"):
                from mlflow.store.db import utils

                utils.MAX_RETRY_COUNT = 1  # the default, 10, tries a database for 100 seconds or more
            # The first client of a database creates its tables, and two clients must not do that concurrently.
            lock = locked(workspace() / ".journal" / "store", self.timeout / 2) if self.local else nullcontext()
            with lock:
                if (path := database_path(self.uri)) and (not path.exists() or not path.stat().st_size):
                    create_database(path)
                client = MlflowClient(self.uri)
                if self.local:
                    client.get_experiment_by_name(EXPERIMENT)
            self._client = client
        return self._client

    def responds(self) -> bool:
        """Return whether the store answers a request."""
        try:
            self.check()
            self.connect().get_experiment_by_name(EXPERIMENT)
        except Exception:
            return False
        return True

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment. Create it if it does not exist; if it was deleted, raise UserError."""
        from mlflow.exceptions import MlflowException

        if name in self._experiments:
            return self._experiments[name]
        client = self.connect()
        found = client.get_experiment_by_name(name)
        if found is None:
            location = (workspace() / "mlartifacts").as_uri() if self.local else None
            try:
                return self._experiments.setdefault(name, client.create_experiment(name, location))
            except MlflowException:  # another process created it first, or the response was lost
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise UserError(f"experiment '{name}' was deleted there; restore it with `{restore}`")
        return self._experiments.setdefault(name, found.experiment_id)

    def find_run(self, journal: Journal) -> Run | None:
        """Return the run of a journal, also if it was deleted; None if there is none."""
        from mlflow.entities import ViewType

        query = f"tags.`{RUN_TAG}` = '{journal.key}'"
        found = self.connect().search_runs([self._experiment_of(journal)], query, ViewType.ALL, max_results=1)
        return next(iter(found), None)

    def create_run(self, journal: Journal) -> str:
        """Create the run of a journal and return its id."""
        named, tags = next(iter(journal.records("name")), {"name": journal.key[:8]}), {RUN_TAG: journal.key}
        if named.get("restored"):
            tags["restored"] = "DVC restored the training from its cache; its metrics are elsewhere"
        for record in journal.records("tags"):
            if USER_TAG in record["values"]:  # MLflow takes the user of a run from its creation only
                tags[USER_TAG] = record["values"][USER_TAG]
        start = journal.records()[0]["time"]
        created = self.connect().create_run(self._experiment_of(journal), start, tags, named["name"])
        return str(created.info.run_id)

    def _experiment_of(self, journal: Journal) -> str:
        named = next(iter(journal.records("name")), {})
        return self.experiment_id(named.get("experiment") or EXPERIMENT)

    def log(self, run_id: str, journal: Journal, records: list[dict[str, Any]], in_flight: bool = False) -> None:
        """Send records of metrics, or one record of another kind, to a run.

        If they are ``in_flight``, an earlier request may have delivered them, so metrics that the store has are
        omitted. Repeating records of other kinds changes nothing in MLflow.
        """
        from mlflow.entities import Param, RunTag

        client, record = self.connect(), records[0]
        values = record.get("values", {})
        match record["kind"]:
            case "metrics":
                self._log_metrics(run_id, records, in_flight)
            case "params":
                stored = client.get_run(run_id).data.params
                new = [Param(name, value) for name, value in values.items() if name not in stored]
                # MLflow's params are immutable, so a changed value is stored as a tag.
                changed = [RunTag(name, value) for name, value in values.items() if stored.get(name, value) != value]
                client.log_batch(run_id, params=new, tags=changed)
            case "tags":
                if NOTE_TAG in values and self._note_was_edited(run_id, journal):
                    values = {name: value for name, value in values.items() if name != NOTE_TAG}
                tags = [RunTag(name, value.replace(RUN_ID, run_id)) for name, value in values.items()]
                client.log_batch(run_id, tags=tags)
            case "dataset":
                self._log_dataset(run_id, record)
            case "artifact":
                folder = PurePosixPath(record["path"]).parent.as_posix()
                copy = journal.folder / "artifacts" / record["path"]
                if not copy.is_file():
                    print(f"minigpt: {copy}: no such file; run {journal.key[:8]} is sent without it", file=sys.stderr)
                    return
                client.log_artifact(run_id, str(copy), None if folder == "." else folder)
            case "status" if record["status"] == "RUNNING":
                client.update_run(run_id, "RUNNING")
            case "status":
                client.set_terminated(run_id, record["status"], record["time"])

    def _note_was_edited(self, run_id: str, journal: Journal) -> bool:
        """Return whether the description of a run in the store is none that the journal has."""
        stored = self.connect().get_run(run_id).data.tags.get(NOTE_TAG)
        written = [record["values"].get(NOTE_TAG, "").replace(RUN_ID, run_id) for record in journal.records("tags")]
        return bool(stored) and stored not in written

    def _log_metrics(self, run_id: str, records: list[dict[str, Any]], in_flight: bool) -> None:
        from mlflow.entities import Metric

        client = self.connect()
        metrics = [Metric(n, v, r["time"], r["step"]) for r in records for n, v in r["values"].items()]
        if in_flight:
            histories = [client.get_metric_history(run_id, name) for name in {metric.key for metric in metrics}]
            stored = {(point.key, point.timestamp, point.step) for history in histories for point in history}
            metrics = [metric for metric in metrics if (metric.key, metric.timestamp, metric.step) not in stored]
        if metrics:
            client.log_batch(run_id, metrics=metrics)

    def _log_dataset(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        name, digest = record["name"], record["digest"][:32]
        source, profile = json.dumps({"uri": record["source"]}), json.dumps(record["profile"])
        dataset = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
        try:
            self.connect().log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        except MlflowException as error:
            if http_status(error) != 404:
                raise
            print(f"minigpt: {self.display_uri} has no datasets; the dataset is recorded as a tag", file=sys.stderr)
            self.connect().set_tag(run_id, "dataset", f"{name} {digest}")


def resolve_tracking_uri() -> str:
    """Return the tracking URI. Credentials move to the environment variables that MLflow reads."""
    if choice := os.environ.get("MINIGPT_TRACKING"):
        if choice != "local":
            raise UserError(f"MINIGPT_TRACKING: expected 'local', got {mask(repr(choice))}")
        return local_store_uri()
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _move_credentials(uri) if uri.startswith("http") else _absolute(uri)
    page = configured_page()
    if page and (token := find_token(page)):
        os.environ |= {"MLFLOW_TRACKING_USERNAME": token, "MLFLOW_TRACKING_PASSWORD": token}
        return f"{page}.mlflow"
    return local_store_uri()


def _move_credentials(uri: str) -> str:
    """Move user and password of a server's address to the environment, and return the address without them."""
    try:
        parts = urlsplit(uri)
        valid = bool(parts.hostname) and (parts.port or 1) and "@" not in parts.path + parts.query + parts.fragment
    except ValueError:  # its text may contain a part of the password
        valid = False
    if not valid:
        hint = "write special characters of a user or password as in %2F for / and %40 for @"
        raise UserError(f"MLFLOW_TRACKING_URI: {mask(uri)} is not the address of a server; {hint}")
    if "@" in parts.netloc:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
        uri = os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return uri


def local_store_uri() -> str:
    """Return the tracking URI of the repository's own store."""
    return sqlite_uri(workspace() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """Return the tracking URI of a database file, which may have any name."""
    if not re.search("[?%]", str(path)):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import make_url

    # Releases of SQLAlchemy differ in how they read both. Without the driver, MLflow would create the quoted folder.
    for uri in (f"sqlite+pysqlite:///{quote(str(path))}", f"sqlite+pysqlite:///{path}"):
        if make_url(uri).database == str(path):
            return uri
    return f"sqlite+pysqlite:///file:{quote(str(path))}?uri=true"


def database_path(uri: str) -> Path | None:
    """Return the file of an SQLite database; None for another store, or for a database in memory."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database or ""
    path = unquote(database.removeprefix("file:")) if database.startswith("file:") else database
    return Path(path) if path not in ("", ":memory:") else None


def create_database(path: Path) -> None:
    """Create a store without runs, which appears complete or not at all. Killed halfway, MLflow could never open it."""
    from mlflow import MlflowClient

    for remains in path.parent.glob(f".{glob.escape(path.name)}-*.tmp*"):
        remove(remains)
    # MLflow keeps the connection to a file, also when another file has its name. So each name is used once.
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    MlflowClient(sqlite_uri(temporary)).get_experiment_by_name(EXPERIMENT)
    temporary.replace(path)


def describe_error(error: Exception) -> str:
    """Return a short description of an error, without secrets."""
    text = str(error).strip() or type(error).__name__
    if found := re.search(r"error code (\d{3}) !=|too many (\d{3}) error|^(401|403)\b", text):
        status = next(filter(None, found.groups()))
        return f"HTTP status {status}" + (": wrong token or password" if status in ("401", "403") else "")
    for part, message in NETWORK_ERRORS.items():
        if part in text:
            return message
    if found := re.search(r"\(\w+\.\w*Error\) ([^\n]+)", text):
        text = found[1]  # the database's error, after SQLAlchemy's advice
    return mask(text.splitlines()[0])[:300]


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error of MLflow, 0 for another error."""
    return int(error.get_http_status_code()) if hasattr(error, "get_http_status_code") else 0


def _absolute(uri: str) -> str:
    """Resolve a relative path against the main workspace. DVC deletes the copies in which it runs experiments."""
    if match := re.fullmatch(r"sqlite:///([^/?][^?]*)(\?.*)?", uri):
        absolute = sqlite_uri(workspace() / unquote(match[1]))
        return absolute + (match[2] or "").replace("?", "&" if "?" in absolute else "?", 1)
    if uri.startswith("file:") and not uri.startswith("file:/"):
        uri = uri.removeprefix("file:")
    if ":" in uri or uri.startswith("databricks"):
        return uri
    folder = workspace() / uri
    return folder.as_uri() if re.search("[?#%]", str(folder)) else str(folder)
