"""The journal of a training run: every record is on the local disk before it is sent to a server."""

import hashlib
import json
import os
import shutil
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from minigpt.errors import UserError
from minigpt.files import fsync, is_run_key, open_file, read_json, remove_unless_file, workspace
from minigpt.tracking.records import parse

EXPERIMENT = "minigpt"  # default name of the MLflow experiment, overridden by MLFLOW_EXPERIMENT_NAME
PARAM_LENGTH, TAG_LENGTH = 500, 5000  # characters of params and tags that old MLflow servers accept


class Journal:
    """Append-only log of the run ``key``: JSON lines in ``.journal/<key>/journal.jsonl`` of the main workspace."""

    def __init__(self, key: str) -> None:
        if not is_run_key(key):
            raise UserError(f"a run has a key of 32 hexadecimal digits, not {key!r:.50}")
        self.key = key
        self.folder = workspace() / ".journal" / key
        self._path = self.folder / "journal.jsonl"
        self._last_steps: dict[str, int] | None = None
        self._lock = threading.Lock()
        self._held: FileLock | None = None

    def clear_place(self) -> None:
        """Remove anything in the place of the journal that is not a file, so that records can be written."""
        remove_unless_file(self._path)

    @property
    def size(self) -> int:
        """Size of the journal in bytes."""
        return self._path.stat().st_size if self._path.exists() else 0

    def since(self, start: int) -> list[tuple[dict[str, Any], int]]:
        """Return the records from byte ``start`` onwards, each with the offset at which it ends.

        Damaged lines are skipped, for example those that a crash truncated.
        """
        found: list[tuple[dict[str, Any], int]] = []
        if not self._path.exists():
            return found
        with open_file(self._path) as file:
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            start += len(line) + 1
            with suppress(ValueError):
                found.append((parse(line), start))
        return found

    def is_boundary(self, offset: int) -> bool:
        """Return whether the journal has a line that ends at byte ``offset``, or ``offset`` is 0."""
        if not 0 < offset <= self.size:
            return offset == 0
        with open_file(self._path) as file:
            file.seek(offset - 1)
            return file.read(1) == b"\n"

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        """Return the records in the order of writing: all, or those of one kind."""
        return [record for record, _ in self.since(0) if kind in ("", record["kind"])]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record metrics at a step. Steps that a resumed training repeats are ignored."""
        with self._lock:
            if self._last_steps is None:
                recorded = self.records("metrics")
                self._last_steps = {name: record["step"] for record in recorded for name in record["values"]}
            fresh = {name: value for name, value in values.items() if step > self._last_steps.get(name, -1)}
            if fresh:
                self._last_steps |= dict.fromkeys(fresh, step)
                self._write("metrics", step=step, values=fresh)

    def stage_metrics(self, values: dict[str, float]) -> None:
        """Record metrics without a training step. The step counts the measurements, starting from 0."""
        measured = sum(1 for record in self.records("metrics") if set(values) <= set(record["values"]))
        self._write("metrics", step=measured, values=values)

    def params(self, values: dict[str, Any]) -> None:
        """Record params by their dotted names."""
        self._write("params", values={name: str(value)[:PARAM_LENGTH] for name, value in values.items()})

    def tags(self, values: dict[str, str]) -> None:
        """Record tags. A later value replaces an earlier one of the same name."""
        self._write("tags", values={name: value[:TAG_LENGTH] for name, value in values.items()})

    def name(self, name: str, restored: bool = False) -> None:
        """Record the display name and the MLflow experiment. A run is ``restored`` if its training left no journal."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self._write("name", name=name, experiment=experiment, restored=restored)

    def dataset(self, name: str, source: str, digest: str, profile: dict[str, int]) -> None:
        """Record the dataset: its name, path, digest and the number of characters of each split."""
        self._write("dataset", name=name, source=source, digest=digest, profile=profile)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, or the files of a directory, under ``folder`` of the run; each is copied next to the journal.

        A file that is already recorded with the same bytes is skipped.
        """
        recorded = {record["path"]: record.get("digest") for record in self.records("artifact")}
        for file in sorted(file for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else [path]:
            name = PurePosixPath(folder, path.name, file.relative_to(path).as_posix()).as_posix()
            copy, digest = self.folder / "artifacts" / name, hashlib.sha256(file.read_bytes()).hexdigest()
            if recorded.get(name) == digest and copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_name(f"{copy.name}.{os.getpid()}")
            shutil.copyfile(file, temporary)
            fsync(temporary)
            temporary.replace(copy)
            self._write("artifact", path=name, digest=digest)

    def status(self, status: str) -> None:
        """Record the status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._write("status", status=status)

    def hold(self) -> None:
        """Mark the run as that of this process, until the process ends in any way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = FileLock(self.folder / "running.lock")
        self._held.acquire()

    def release(self) -> None:
        """Undo :meth:`hold`."""
        if self._held:
            self._held.release()

    def close_if_dead(self) -> None:
        """Record ``KILLED`` if the run is recorded as running, but its process has ended without a record."""
        if [record["status"] for record in self.records("status")][-1:] != ["RUNNING"]:
            return
        with suppress(Timeout), FileLock(self.folder / "running.lock").acquire(blocking=False):
            self.status("KILLED")

    def mlflow_ids(self) -> dict[str, str]:
        """Return the ID of the run in MLflow by the address of the store, for each store that has it."""
        found = {}
        for path in sorted(self.folder.glob("sent-*.json")):
            with suppress(OSError, ValueError):  # as in Progress, a damaged file counts as missing
                content = read_json(path)
                if isinstance(content, dict) and isinstance(content.get("run_id"), str):
                    found[str(content.get("store", ""))] = content["run_id"]
        return found

    def flush(self) -> None:
        """Flush the journal to the disk, so that it survives a power cut."""
        if self._path.exists():
            fsync(self._path)
            fsync(self.folder)

    def _write(self, kind: str, **fields: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"kind": kind, "time": int(time.time() * 1000), **fields}
        with locked(self._path), self._path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):  # a crash or a full disk left a partial line
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def journals() -> list[Journal]:
    """Return the journals of this workspace."""
    folders = [path.parent for path in (workspace() / ".journal").glob("*/journal.jsonl")]
    return [Journal(folder.name) for folder in sorted(folders) if is_run_key(folder.name)]


def locked(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
    """Return a context in which no other thread or process has ``path``. A killed process loses its lock.

    Raise TimeoutError if another process still has it after ``timeout`` seconds, unless that is negative.
    """
    lock = Path(f"{path}.lock")
    remove_unless_file(lock)
    # Writing a record takes less than a millisecond, so filelock's 50 ms between two attempts would dominate.
    return FileLock(lock).acquire(timeout, poll_interval=0.01)
