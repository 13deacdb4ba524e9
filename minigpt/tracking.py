"""The journal of a training, on disk first, and its mirror in MLflow: here, on a server, or on DagsHub.

Where runs go: MLFLOW_TRACKING_URI if it is set; else DagsHub, if DAGSHUB_REPO=user/repo and DAGSHUB_USER_TOKEN are;
else mlflow.db in the repository. A store that cannot be reached costs a training nothing but its mirror:
``python -m minigpt.tracking sync`` sends what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.corpus import Corpus
from minigpt.errors import UserError, run
from minigpt.files import replacing, write_json
from minigpt.params import Params, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "minigpt"
"""The name of the MLflow experiment; the environment's MLFLOW_EXPERIMENT_NAME goes before."""

TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds and retries of a request to a server, unless the environment has others: MLflow's own block for minutes."""

RUN_TAG = "minigpt.run"
"""The MLflow tag that holds a run's key: how a run is found again."""

METRICS_PER_REQUEST = 1000
"""What MLflow's API takes in one batch."""

TRAINED = ("data", "model", "train")
"""The sections of params.yaml that the train stage records; the later stages record their own."""

VALUE_LENGTH = 500
"""Longest value of a param that old servers take."""


def workspace() -> Path:
    """The main workspace: DVC runs queued experiments in copies of it, which vanish."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def store() -> str:
    """The tracking URI; credentials go to the environment that MLflow reads, never into the URI."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    repo, token = os.environ.get("DAGSHUB_REPO"), os.environ.get("DAGSHUB_USER_TOKEN")
    if repo and token:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", token)
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", token)
        return f"https://dagshub.com/{repo}.mlflow"
    return f"sqlite:///{workspace() / 'mlflow.db'}"


class Journal:
    """Everything that is known of a run, as lines of JSON in ``.journal/<key>/journal.jsonl`` of the main workspace.

    Args:
        key: of the run; 32 hexadecimal digits.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.folder = workspace() / ".journal" / key
        self._metrics_until: dict[str, int] | None = None
        self._checked = False

    def records(self) -> list[dict[str, Any]]:
        """All that was written, in order. A last line cut short by a crash is left out."""
        try:
            lines = (self.folder / "journal.jsonl").read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Values at a step. What a resumed training says again is not written again."""
        if self._metrics_until is None:
            self._metrics_until = {}
            for record in self.records():
                if record["kind"] == "metrics":
                    self._metrics_until |= dict.fromkeys(record["values"], record["step"])
        fresh = {name: value for name, value in values.items() if step > self._metrics_until.get(name, -1)}
        if fresh:
            self._metrics_until |= dict.fromkeys(fresh, step)
            self._write("metrics", step=step, values=fresh)

    def again(self, values: dict[str, float]) -> None:
        """Values that belong to no step, and may be measured again: each counts up from 0."""
        measured = sum(
            1 for record in self.records() if record["kind"] == "metrics" and set(values) <= set(record["values"])
        )
        self._write("metrics", step=measured, values=values)

    def params(self, values: dict[str, Any]) -> None:
        """Parameters, by their dotted names."""
        self._write("params", values={name: str(value)[:VALUE_LENGTH] for name, value in values.items()})

    def tags(self, values: dict[str, str]) -> None:
        """Tags; a later value of a name takes the place of the earlier one."""
        self._write("tags", values=values)

    def name(self, name: str) -> None:
        """What the run is called."""
        self._write("name", name=name)

    def dataset(self, name: str, source: str, digest: str, profile: dict[str, int]) -> None:
        """What was read: its name, where it lies, its digest, and its numbers of characters."""
        self._write("dataset", name=name, source=source, digest=digest, profile=profile)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder, kept beside the journal; it appears in the run under ``folder``."""
        kept = Path("artifacts") / folder / path.name
        with replacing(self.folder / kept) as target:
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copy(path, target)
        self._write("artifact", path=kept.as_posix(), folder=folder, is_folder=path.is_dir())

    def status(self, status: str) -> None:
        """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._write("status", status=status)

    def _write(self, kind: str, **fields: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"kind": kind, "time": int(time.time() * 1000), **fields}
        with (self.folder / "journal.jsonl").open("a+b") as file:
            if not self._checked:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a crash may have left half a line
                self._checked = True
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


class Mirror:
    """Sends journals to a store, each record once.

    How far a journal has been sent is kept in ``sent.json`` beside it, a count of records for each store. A crash
    between sending and counting sends one batch again: MLflow keeps one copy of a metric with equal step, time and
    value.

    Args:
        uri: the tracking URI of the store.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: MlflowClient | None = None
        self._experiment = ""

    def send(self, journal: Journal) -> None:
        """Send what the store does not have yet.

        Raises:
            Exception: whatever MLflow raises where the store cannot be reached or refuses.
        """
        records = journal.records()
        path = journal.folder / "sent.json"
        sent: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        done = sent.get(self.uri, 0)
        if done == len(records):
            return
        run_id = self._run(journal, records)
        while done < len(records):
            group = [records[done]]
            while done + len(group) < len(records) and _batches_with(group, records[done + len(group)]):
                group.append(records[done + len(group)])
            self._send(run_id, journal, group)
            done += len(group)
            sent[self.uri] = done
            temporary = path.with_name(f"sent.{os.getpid()}")
            write_json(temporary, sent)
            temporary.replace(path)

    def run_id(self, key: str) -> str | None:
        """The MLflow id of the run with this key, if the store has it."""
        client, experiment = self._connect()
        found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _connect(self) -> tuple[MlflowClient, str]:
        if self._client is None:
            for name, value in TIMEOUTS.items():
                os.environ.setdefault(name, value)
            import logging

            for chatty in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(chatty).setLevel(logging.WARNING)
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException

            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            # The first client of a database makes its tables, which must not happen twice at once.
            with _file_lock(workspace() / ".journal" / "store.lock"):
                client = MlflowClient(self.uri)
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    local = self.uri.startswith("sqlite:")
                    location = (workspace() / "mlartifacts").as_uri() if local else None
                    try:
                        self._experiment = client.create_experiment(name, location)
                    except MlflowException:
                        experiment = client.get_experiment_by_name(name)
                        if experiment is None:
                            raise
                if experiment is not None:
                    self._experiment = experiment.experiment_id
            self._client = client
        return self._client, self._experiment

    def _run(self, journal: Journal, records: list[dict[str, Any]]) -> str:
        client, experiment = self._connect()
        if run_id := self.run_id(journal.key):
            return run_id
        name = next((record["name"] for record in records if record["kind"] == "name"), journal.key[:8])
        tags = {RUN_TAG: journal.key}
        return str(client.create_run(experiment, records[0]["time"], tags, name).info.run_id)

    def _send(self, run_id: str, journal: Journal, group: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, _ = self._connect()
        kind, record = group[0]["kind"], group[0]
        if kind == "metrics":
            client.log_batch(
                run_id,
                metrics=[Metric(n, v, r["time"], r["step"]) for r in group for n, v in r["values"].items()],
            )
        elif kind == "params":
            has = client.get_run(run_id).data.params
            fresh = [Param(name, value) for name, value in record["values"].items() if name not in has]
            other = [RunTag(n, v) for n, v in record["values"].items() if has.get(n, v) != v]
            client.log_batch(run_id, params=fresh, tags=other)
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in record["values"].items()])
        elif kind == "dataset":
            client.log_inputs(run_id, [_dataset_input(record)])
        elif kind == "artifact":
            inner = journal.folder / record["path"]
            if record["is_folder"]:
                client.log_artifacts(run_id, str(inner), "/".join(filter(None, (record["folder"], inner.name))))
            else:
                client.log_artifact(run_id, str(inner / inner.name), record["folder"] or None)
        elif kind == "status":
            if record["status"] == "RUNNING":
                client.update_run(run_id, "RUNNING")
            else:
                client.set_terminated(run_id, record["status"], record["time"])


def _batches_with(group: list[dict[str, Any]], record: dict[str, Any]) -> bool:
    size = sum(len(r["values"]) for r in [*group, record] if "values" in r)
    return group[0]["kind"] == record["kind"] == "metrics" and size <= METRICS_PER_REQUEST


def _dataset_input(record: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:32],
        source_type="local",
        source=json.dumps({"uri": record["source"]}),
        profile=json.dumps(record["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Tracker:
    """A run as a stage sees it: everything goes to its journal, and from there to the store, if that answers.

    Args:
        key: of the run.
    """

    def __init__(self, key: str) -> None:
        self.journal = Journal(key)
        self._mirror = Mirror(store())
        self._silent = False

    @property
    def place(self) -> str:
        """Where the run can be seen."""
        return self._mirror.uri

    def begin(self, params: Params, corpus: Corpus) -> None:
        """Say what is trained on what; of a run that goes on, only that it does."""
        journal, model = self.journal, params.model
        if not journal.records():
            source = Path(params.data.source)
            shape = f"{source.stem} {model.n_layer}x{model.n_embd} {journal.key[:6]}"
            journal.name(os.environ.get("DVC_EXP_NAME") or shape)
            journal.params(flatten({key: value for key, value in params.model_dump().items() if key in TRAINED}))
            journal.tags(provenance())
            journal.dataset(
                source.name, str(source), corpus.digest, {"train": len(corpus.train), "val": len(corpus.val)}
            )
        journal.status("RUNNING")
        self.mirror()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write values at a step to the journal."""
        self.journal.metrics(step, values)

    def stage(self, name: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add what a later stage did to the run, and send it: its params, and its metrics as ``name.metric``."""
        if not self.journal.records():
            self.journal.name(f"{os.environ.get('DVC_EXP_NAME') or self.journal.key[:6]} (restored)")
            self.journal.tags(
                provenance() | {"restored": "DVC restored the training from its cache; its metrics are elsewhere"}
            )
        self.journal.params(params)
        if metrics:
            self.journal.again({f"{name}.{metric}": value for metric, value in metrics.items()})
        self.journal.status("FINISHED")
        self.mirror()

    def mirror(self) -> None:
        """Send what is new. A failure is told once, and nothing more is tried."""
        self.attempt(lambda: self._mirror.send(self.journal))

    def attempt(self, action: Callable[[], None]) -> None:
        """Do what only tracking needs: where it fails, say so once, and let the training be."""
        if self._silent:
            return
        try:
            action()
        except Exception as error:
            self._silent = True
            print(
                f"minigpt: not tracked in {self.place}: {_reason(error)}; the run is in {self.journal.folder}, "
                f"and `python -m minigpt.tracking sync` sends it later",
                file=sys.stderr,
            )


def of_model(record: Path) -> Tracker:
    """The tracker of the run that trained this workspace's model, for a later stage.

    Raises:
        UserError: ``record``, the file that names the run, is missing or damaged.
    """
    try:
        return Tracker(json.loads(record.read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: does not name a run ({error}); `dvc repro train` makes it") from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def provenance() -> dict[str, str]:
    """Tags that say where a run comes from: the git commit, and DVC's name and baseline of the experiment."""
    tags = {}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        tags["git"] = "none"
    for tag, name in (("dvc.experiment", "DVC_EXP_NAME"), ("dvc.baseline", "DVC_EXP_BASELINE_REV")):
        if value := os.environ.get(name):
            tags[tag] = value
    return tags


def sync() -> int:
    """Send what the store does not have, of every run of this workspace; gives the number of runs."""
    mirror = Mirror(store())
    folder = workspace() / ".journal"
    keys = sorted(path.parent.name for path in folder.glob("*/journal.jsonl"))
    journals = sorted((Journal(key) for key in keys), key=lambda j: (j.records() or [{"time": 0}])[0]["time"])
    for journal in journals:
        try:
            if journal.records():
                mirror.send(journal)
        except Exception as error:
            raise UserError(f"{mirror.uri}: run {journal.key[:8]} could not be sent: {_reason(error)}") from None
    return len(journals)


def _main() -> None:
    if sys.argv[1:] != ["sync"]:
        raise UserError("usage: python -m minigpt.tracking sync")
    print(f"minigpt: {sync()} runs are in {store()}")


if __name__ == "__main__":
    run(_main)
