"""Upload of journals to a tracking store, with progress that survives interruptions.

An unreachable store never stops a training. `minigpt sync` sends the missing records later.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from minigpt.errors import UserError
from minigpt.files import remove_unless_file, workspace
from minigpt.tracking.journal import Journal, journals, locked
from minigpt.tracking.store import Store, describe_error, http_status, resolve_tracking_uri

Entry = tuple[dict[str, Any], int]  # a record, and the offset in the journal at which it ends

TIMEOUT, SYNC_TIMEOUT = 10, 60  # seconds until a request counts as lost, during a stage and in `sync`
# Consecutive retries of `sync` without progress. Seconds before the first one, doubled for each later one.
RETRIES, RETRY_DELAY = 3, 1.0
METRICS_PER_REQUEST = 1000  # limit of MLflow's API
# Files sent concurrently. Each is one request, and a server spends most of a request on checking the password.
PARALLEL_UPLOADS = 8


class Uploader:
    """Sends journals to a store: each record once and in order, even after interruptions.

    It calls ``accepted`` after each request that the store accepts.
    """

    def __init__(self, uri: str, timeout: int = TIMEOUT, accepted: Callable[[], None] | None = None) -> None:
        self.store = Store(uri, timeout)
        self.display_uri = self.store.display_uri
        self.sent = 0  # records, over all journals
        self.last_success = -math.inf  # time of the last accepted request, by time.monotonic
        self._report = accepted or (lambda: None)
        self._run_ids: dict[str, str] = {}
        self._digest = hashlib.sha256(os.fsencode(self.display_uri)).hexdigest()[:8]
        # A stage touches this file after it has waited for the store without success.
        self.unreachable_marker = workspace() / ".journal" / f"away-{self._digest}"

    def send(self, journal: Journal, check: bool = False) -> None:
        """Send the records that the store does not have yet, or raise the error of MLflow.

        A run that was deleted there stays deleted. With ``check``, look it up even if all its records were sent.
        """
        if check or self.missing(journal):
            with locked(self._progress_path(journal), self.store.timeout / 2):
                try:
                    self.store.check()
                    self._send_pending(journal)
                except Exception:
                    self._run_ids.pop(journal.key, None)  # the run may have been deleted: look it up again
                    raise

    def missing(self, journal: Journal) -> int:
        """Return the number of records that are not known to be in the store."""
        return len(journal.since(Progress(self._progress_path(journal), journal).sent))

    def note_success(self) -> None:
        """Note that the store has accepted a request."""
        self.last_success = time.monotonic()

    def _progress_path(self, journal: Journal) -> Path:
        return journal.folder / f"sent-{self._digest}.json"

    def _send_pending(self, journal: Journal) -> None:
        progress = Progress(self._progress_path(journal), journal, self.display_uri)
        if journal.key not in self._run_ids:
            run = self.store.find_run(journal)
            if run and run.info.lifecycle_stage == "deleted":
                print(f"minigpt: run {journal.key[:8]} was deleted in {self.display_uri}; nothing more is sent")
                progress.save(journal.since(0)[-1][1], 0)
                return
            if run is None:
                progress.save(0, 0)
            self._run_ids[journal.key] = run.info.run_id if run else self.store.create_run(journal)
        progress.run_id = run_id = self._run_ids[journal.key]
        pending = journal.since(progress.sent)
        # A power cut must not remove records from the journal that the store already has.
        journal.flush()
        latest = {record["path"]: end for record, end in pending if record["kind"] == "artifact"}

        def upload_file(entry: Entry) -> None:
            record, end = entry
            if latest[record["path"]] == end:  # otherwise a later record replaces the file
                self.store.log(run_id, journal, [record])

        def accepted(end: int, records: int) -> None:
            progress.save(end, progress.in_flight)
            self.sent += records
            self.note_success()
            self._report()

        for batch in _batches(pending):
            (first, first_end), (_, end) = batch[0], batch[-1]
            in_flight = first_end <= progress.in_flight
            progress.save(progress.sent, max(end, progress.in_flight))
            if first["kind"] == "artifact":
                for _, file_end in _in_parallel(upload_file, batch):
                    accepted(file_end, 1)
            else:
                self.store.log(run_id, journal, [record for record, _ in batch], in_flight)
                accepted(end, len(batch))


class Offsets(BaseModel):
    """Content of a progress file: positions in the journal, in bytes, and the ID of the run in the store."""

    model_config = ConfigDict(strict=True)

    next: int = Field(ge=0)
    # Earlier versions wrote "doubtful" for "in_flight".
    in_flight: int = Field(ge=0, validation_alias=AliasChoices("in_flight", "doubtful"))
    run_id: str = ""


class Progress:
    """Upload progress of one journal to one store, kept in a file next to the journal.

    If the file is missing or damaged, for example truncated by a crash, progress restarts from 0 and every byte of the
    journal counts as possibly sent.

    All records up to the offset ``sent`` are in the store. Those up to ``in_flight`` were in a request, and may be in
    the store if its response was lost.
    """

    def __init__(self, path: Path, journal: Journal, display_uri: str = "") -> None:
        self._path, self._display_uri = path, display_uri
        try:
            read = Offsets.model_validate_json(path.read_bytes() if path.is_file() else b"")
            if not journal.is_boundary(read.next):
                raise ValueError(f"no record ends at byte {read.next}")
        except ValueError:
            read = Offsets(next=0, in_flight=journal.size)
        self.sent, self.in_flight, self.run_id = read.next, read.in_flight, read.run_id

    def save(self, sent: int, in_flight: int) -> None:
        """Set both offsets and write the file."""
        self.sent, self.in_flight = sent, in_flight
        content = {"store": self._display_uri, "next": sent, "in_flight": in_flight}
        if self.run_id:
            content["run_id"] = self.run_id
        remove_unless_file(self._path)
        self._path.write_bytes(json.dumps(content).encode() + b"\n")


def _batches(pending: list[Entry]) -> Iterator[list[Entry]]:
    """Group consecutive records: metrics by requests, artifacts for parallel uploads, others one by one."""
    batch: list[Entry] = []
    metrics = 0
    for record, end in pending:
        kind, values = record["kind"], len(record.get("values", ()))
        fits = kind == "artifact" or (kind == "metrics" and metrics + values <= METRICS_PER_REQUEST)
        if batch and not (fits and kind == batch[0][0]["kind"]):
            yield batch
            batch, metrics = [], 0
        batch.append((record, end))
        metrics += values
    if batch:
        yield batch


def _in_parallel(action: Callable[[Entry], None], items: list[Entry]) -> Iterator[Entry]:
    """Call ``action`` on each item, PARALLEL_UPLOADS at a time; yield the items in order when they are done.

    The first item goes alone: an unreachable store then gets one request, and MLflow looks up only once where the
    files of a run are stored. After an error no new call starts, and running calls finish first, so that a retry
    cannot overlap with them. The threads are daemons, because those of concurrent.futures delay the program's exit.
    """
    action(items[0])
    yield items[0]
    calls: list[tuple[Entry, Future[None]]] = [(item, Future()) for item in items[1:]]
    waiting, stop = iter(calls), threading.Event()

    def work() -> None:
        while not stop.is_set() and (started := next(waiting, None)):
            item, call = started
            try:
                action(item)
                call.set_result(None)
            except Exception as error:
                stop.set()
                call.set_exception(error)

    threads = [threading.Thread(target=work, name="upload", daemon=True) for _ in calls[:PARALLEL_UPLOADS]]
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
        stop.set()


def sync() -> int:
    """Send every run of this workspace to the store, oldest first, and return their number.

    If the store is unreachable or refuses some runs, raise UserError. Records sent before that stay in the store.
    """
    uploader = Uploader(resolve_tracking_uri(), SYNC_TIMEOUT)
    starts: dict[Journal, int] = {}
    errors = []
    for journal in journals():
        try:
            journal.close_if_dead()
            starts.update((journal, record["time"]) for record in journal.records()[:1])
        except OSError as error:
            errors.append(f"{journal.folder}: cannot read the journal: {error.strerror}")
    for position, journal in enumerate(sorted(starts, key=lambda journal: starts[journal]), 1):
        before = uploader.sent
        try:
            _send_with_retries(uploader, journal)
        except Exception as error:
            responds, later = uploader.store.responds(), len(starts) - position
            runs = "was" if responds or not later else f"and {later} more were"
            errors.append(f"run {journal.key[:8]} {runs} not sent to {uploader.display_uri}: {describe_error(error)}")
            if not responds:
                break
        if uploader.sent > before:
            print(f"minigpt: run {journal.key[:8]}: {uploader.sent - before} records sent")
    if errors:
        raise UserError("\nminigpt: ".join(errors))
    return len(starts)


def _send_with_retries(uploader: Uploader, journal: Journal) -> None:
    """Send a journal; after RETRIES consecutive retries without progress, raise the last error."""
    failures = 0
    while True:
        before = uploader.sent
        try:
            return uploader.send(journal, check=True)
        except Exception as error:
            failures = 0 if uploader.sent > before else failures + 1
            if failures > RETRIES or _is_permanent(error):
                raise
            time.sleep(RETRY_DELAY * 2 ** max(0, failures - 1))


def _is_permanent(error: Exception) -> bool:
    """Return whether a retry would fail in the same way: the store refused the request, or did not cause the error."""
    if status := http_status(error):
        return 400 <= status < 500 and status != 429
    return not isinstance(error, OSError)  # the HTTP library's errors are OSErrors
