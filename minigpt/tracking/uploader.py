"""The mirror of trainings in MLflow: here, on a server, or on DagsHub.

Where runs go: MLFLOW_TRACKING_URI if it is set; else DagsHub, if DAGSHUB_REPO=user/repo and DAGSHUB_USER_TOKEN are;
else mlflow.db in the repository. A store that cannot be reached costs a training nothing but its mirror:
``minigpt sync`` sends what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

from minigpt.errors import UserError, run
from minigpt.files import workspace
from minigpt.tracking.journal import EXPERIMENT, Journal, locked
from minigpt.tracking.store import reason, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")

TIMEOUT, SYNC_TIMEOUT = 10, 60
"""Seconds until a request counts as lost, beside a stage and in a sync; MLFLOW_HTTP_REQUEST_TIMEOUT goes before."""

RETRIES, PAUSE = 3, 1.0
"""How often in a row a sync tries again where nothing arrives; seconds before the first time, doubled for each next."""

RUN_TAG = "minigpt.run"
"""The MLflow tag that holds a run's key: how a run is found again."""

METRICS_PER_REQUEST = 1000
"""What MLflow's API takes in one batch."""

UPLOADS = 8
"""Files that are sent at a time: each is a request, and a server spends most of one on checking the password."""


class Uploader:
    """Sends journals to a store: each record once, in order, however often it is interrupted.

    How far a journal has been sent is kept beside it, in a file for each store: the byte that comes next, and the
    byte up to which a request was under way. Where that request's answer was lost, the store is asked which metrics
    it has; to send the rest again changes nothing in MLflow.

    Args:
        uri: the tracking URI of the store.
        timeout: seconds until a request counts as lost.

    Attributes:
        place: the URI as it may be printed, without credentials.
        sent: records sent so far, of all journals.
        taken: when the store took the last of them, by ``time.monotonic``.
    """

    def __init__(self, uri: str, timeout: int = TIMEOUT) -> None:
        self.uri, self.timeout = uri, timeout
        self.display_uri = re.sub("://[^/]*@", "://", uri)
        self.local = uri.startswith(("sqlite:", "file:")) or ":" not in uri
        self._client: MlflowClient | None = None
        self.sent, self.taken = 0, -math.inf
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def send(self, journal: Journal, check: bool = False) -> None:
        """Send what the store does not have yet. A run that was deleted there is left alone.

        Args:
            journal: of the run.
            check: ask the store whether it still has the run, even where all was sent.

        Raises:
            Exception: whatever MLflow raises where the store cannot be reached or refuses.
        """
        if check or self.missing(journal):
            with locked(self._progress(journal)) as file:
                try:
                    self._send_from(journal, file)
                except Exception:
                    self._runs.pop(journal.key, None)  # it may be gone there: look for it again
                    raise

    def missing(self, journal: Journal) -> int:
        """How many records have not been sent, as far as is known on this side."""
        try:
            return len(journal.since(_read_progress(self._progress(journal).read_bytes(), journal.size)["next"]))
        except FileNotFoundError:
            return len(journal.records())

    def _progress(self, journal: Journal) -> Path:
        return journal.folder / f"sent-{self._digest}.json"

    @property
    def away(self) -> Path:
        """A file whose age says how long ago the store was waited for in vain."""
        return workspace() / ".journal" / f"away-{self._digest}"

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.uri.encode()).hexdigest()[:8]

    def _send_from(self, journal: Journal, file: IO[bytes]) -> None:
        file.seek(0)
        progress = _read_progress(file.read(), journal.size)

        def note(**changes: int) -> None:
            progress.update(changes)
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"store": self.display_uri, **progress}).encode() + b"\n")
            file.flush()

        if journal.key not in self._runs:
            known, end = self._find(journal.key, self._experiment(journal)), journal.since(0)[-1][1]
            if known is None:
                note(next=0, doubtful=0)
                self._runs[journal.key] = self._create(journal)
            elif known.info.lifecycle_stage == "deleted":
                print(f"minigpt: {self.display_uri}: run {journal.key[:8]} was deleted there: nothing more is sent")
                note(next=end, doubtful=0)
            else:
                self._runs[journal.key] = known.info.run_id
        pending = journal.since(progress["next"])
        journal.flush()  # else a power cut takes from the journal what the store has been sent
        last = {record["path"]: end for record, end in pending if record["kind"] == "artifact"}

        def arrived(end: int, records: int) -> None:
            note(next=end)
            self.sent += records
            self.taken = time.monotonic()

        def upload(entry: tuple[dict[str, Any], int]) -> None:
            record, end = entry
            if last[record["path"]] == end:
                self._send(journal, [record], doubtful=False)

        done = 0
        while done < len(pending):
            group = [pending[done]]
            while done + len(group) < len(pending) and _batches_with(group, pending[done + len(group)][0]):
                group.append(pending[done + len(group)])
            (first, first_end), end = group[0], group[-1][1]
            doubtful = first_end <= progress["doubtful"]
            note(doubtful=max(end, progress["doubtful"]))
            if first["kind"] == "artifact":
                for _, file_end in _abreast(upload, group):
                    arrived(file_end, 1)
            else:
                self._send(journal, [record for record, _ in group], doubtful)
                arrived(end, len(group))
            done += len(group)

    def connect(self) -> MlflowClient:
        """The client of the store; importing MLflow takes seconds, and nothing is sent yet."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self.timeout))
            # MLflow's own second try makes a second run, where only the answer to the first was lost.
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            import logging

            for chatty in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(chatty).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            if not self.local:
                self._client = MlflowClient(self.uri)
                return self._client
            # The first client of a database makes its tables, which must not happen twice at once.
            with locked(workspace() / ".journal" / "store.lock"):
                self._client = MlflowClient(self.uri)
                self._client.get_experiment_by_name(EXPERIMENT)
        return self._client

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is made where there is none."""
        from mlflow.exceptions import MlflowException

        client = self.connect()
        if name not in self._experiments:
            found = client.get_experiment_by_name(name)
            if found and found.lifecycle_stage == "deleted":
                raise UserError(
                    f"its experiment '{name}' was deleted there; "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
                )
            if found is None:
                location = (workspace() / "mlartifacts").as_uri() if self.local else None
                try:
                    self._experiments[name] = client.create_experiment(name, location)
                    return self._experiments[name]
                except MlflowException:  # another process was faster, or its answer was lost
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _experiment(self, journal: Journal) -> str:
        return self.experiment(next((record["experiment"] for record in journal.records("name")), EXPERIMENT))

    def _find(self, key: str, experiment: str) -> Run | None:
        from mlflow.entities import ViewType

        found = self.connect().search_runs(
            [experiment],
            f"tags.`{RUN_TAG}` = '{key}'",
            ViewType.ALL,
            max_results=1,
        )
        return found[0] if found else None

    def _create(self, journal: Journal) -> str:
        records = journal.records()
        named = next((record for record in records if record["kind"] == "name"), {"name": journal.key[:8]})
        tags = {RUN_TAG: journal.key}
        if named.get("restored"):
            tags["restored"] = "DVC restored the training from its cache; its metrics are elsewhere"
        created = self.connect().create_run(self._experiment(journal), records[0]["time"], tags, named["name"])
        return str(created.info.run_id)

    def _send(self, journal: Journal, group: list[dict[str, Any]], doubtful: bool) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self.connect(), self._runs[journal.key]
        kind, record = group[0]["kind"], group[0]
        if kind == "metrics":
            metrics = [Metric(n, v, r["time"], r["step"]) for r in group for n, v in r["values"].items()]
            if doubtful:
                there = {
                    (name, known.timestamp, known.step)
                    for name in {metric.key for metric in metrics}
                    for known in client.get_metric_history(run_id, name)
                }
                metrics = [metric for metric in metrics if (metric.key, metric.timestamp, metric.step) not in there]
            if metrics:
                client.log_batch(run_id, metrics=metrics)
        elif kind == "params":
            has = client.get_run(run_id).data.params
            fresh = [Param(name, value) for name, value in record["values"].items() if name not in has]
            other = [RunTag(n, v) for n, v in record["values"].items() if has.get(n, v) != v]
            client.log_batch(run_id, params=fresh, tags=other)
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in record["values"].items()])
        elif kind == "dataset":
            self._send_dataset(run_id, record)
        elif kind == "artifact":
            folder = PurePosixPath(record["path"]).parent.as_posix()
            kept = journal.folder / "artifacts" / record["path"]
            client.log_artifact(run_id, str(kept), None if folder == "." else folder)
        elif kind == "status":
            if record["status"] == "RUNNING":
                client.update_run(run_id, "RUNNING")
            else:
                client.set_terminated(run_id, record["status"], record["time"])

    def _send_dataset(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:32],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        try:
            self.connect().log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        except MlflowException as error:
            if error.get_http_status_code() != 404:
                raise
            print(f"minigpt: {self.display_uri} knows no datasets; the run has its dataset as a tag", file=sys.stderr)
            self.connect().set_tag(run_id, "dataset", f"{record['name']} {record['digest'][:32]}")


def _read_progress(text: bytes, written: int) -> dict[str, int]:
    """Progress of nothing where ``text``, cut short by a crash, is none: then all ``written`` bytes are doubtful."""
    try:
        read = json.loads(text)
        return {"next": int(read["next"]), "doubtful": int(read["doubtful"])}
    except (ValueError, KeyError, TypeError):
        return {"next": 0, "doubtful": written}


def _batches_with(group: list[tuple[dict[str, Any], int]], record: dict[str, Any]) -> bool:
    kind = group[0][0]["kind"]
    if kind != "metrics" or record["kind"] != "metrics":
        return kind == record["kind"] == "artifact"  # files go together, each in a request of its own
    return sum(len(r["values"]) for r, _ in group) + len(record["values"]) <= METRICS_PER_REQUEST


def _abreast(action: Callable[[T], None], items: list[T]) -> Iterator[T]:
    """Call ``action`` with the first item, then with the others, UPLOADS at a time; gives each back once it is done.

    They come back in their order. The first goes alone: a store that takes nothing is asked once, and where a run's
    files go is looked up once. After an error no call is begun, and those under way are waited for: what is sent again
    must not meet them. The threads are daemons: those of concurrent.futures would hold up the end of the program.

    Raises:
        Exception: that of the first item whose call failed.
    """
    action(items[0])
    yield items[0]
    calls: list[tuple[T, Future[None]]] = [(item, Future()) for item in items[1:]]
    waiting = deque(calls)

    def work() -> None:
        while True:
            try:
                item, call = waiting.popleft()
            except IndexError:
                return
            try:
                action(item)
                call.set_result(None)
            except Exception as error:
                waiting.clear()
                call.set_exception(error)

    threads = [threading.Thread(target=work, name="upload", daemon=True) for _ in calls[:UPLOADS]]
    for thread in threads:
        thread.start()
    try:
        for item, call in calls:
            call.result()
            yield item
    except Exception:
        for thread in threads:
            thread.join()
        raise
    finally:
        waiting.clear()


def sync() -> int:
    """Send what the store does not have, of every run of this workspace, the oldest first; gives their number.

    Raises:
        UserError: the store refuses runs, which are named, or does not answer; all that it took is there.
    """
    mirror = Uploader(resolve_tracking_uri(), SYNC_TIMEOUT)
    keys = [path.parent.name for path in (workspace() / ".journal").glob("*/journal.jsonl")]
    starts = {key: next((record["time"] for record in Journal(key).records()), None) for key in keys}
    keys = sorted((key for key in keys if starts[key] is not None), key=lambda key: (starts[key], key))
    refused = []
    for key in keys:
        before = mirror.sent
        try:
            _send_patiently(mirror, Journal(key))
        except Exception as error:
            refused.append(f"{mirror.display_uri}: run {key[:8]} could not be sent: {reason(error)}")
            if not _final(error):
                break
        if mirror.sent > before:
            print(f"minigpt: run {key[:8]}: {mirror.sent - before} records sent")
    if refused:
        raise UserError("\nminigpt: ".join(refused))
    return len(keys)


def _send_patiently(mirror: Uploader, journal: Journal) -> None:
    """Send a journal; where the store is away for a moment, try again, RETRIES times without any progress."""
    tries = 0
    while True:
        before = mirror.sent
        try:
            mirror.send(journal, check=True)
            return
        except Exception as error:
            tries = 0 if mirror.sent > before else tries + 1
            if tries > RETRIES or _final(error):
                raise
            time.sleep(PAUSE * 2 ** max(0, tries - 1))


def _final(error: Exception) -> bool:
    """Whether the store has answered, and will give the same answer again."""
    if isinstance(error, UserError):
        return True
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= int(status) < 500 and status != 429


def _main() -> None:
    if sys.argv[1:] != ["sync"]:
        raise UserError("usage: minigpt sync")
    print(f"minigpt: {sync()} runs are in {Uploader(resolve_tracking_uri()).display_uri}")


if __name__ == "__main__":
    run(_main)
