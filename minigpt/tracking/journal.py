"""The journal of a training: all that is known of a run, on disk before anybody else is told."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from minigpt import files
from minigpt.files import workspace

EXPERIMENT = "minigpt"
"""The name of the MLflow experiment; the environment's MLFLOW_EXPERIMENT_NAME goes before."""

PARAM_LENGTH, TAG_LENGTH = 500, 5000
"""Longest values of params and tags that old servers take, in characters."""


class Journal:
    """Everything that is known of a run, as lines of JSON in ``.journal/<key>/journal.jsonl`` of the main workspace.

    Args:
        key: of the run; 32 hexadecimal digits.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.folder = workspace() / ".journal" / key
        self._metrics_until: dict[str, int] | None = None
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes that were written so far."""
        return (self.folder / "journal.jsonl").stat().st_size

    def since(self, start: int) -> list[tuple[dict[str, Any], int]]:
        """Records from byte ``start`` on, each with the byte where the next one starts.

        Lines that a crash cut short or spoiled are left out.
        """
        try:
            with (self.folder / "journal.jsonl").open("rb") as file:
                file.seek(start)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            start += len(line) + 1
            try:
                found.append((json.loads(line), start))
            except ValueError:
                continue
        return found

    def records(self, kind: str = "") -> list[dict[str, Any]]:
        """All that was written, in order, or what of it is of one kind."""
        return [record for record, _ in self.since(0) if kind in ("", record["kind"])]

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Values at a step. What a resumed training says again is not written again."""
        with self._lock:
            if self._metrics_until is None:
                self._metrics_until = {}
                for record in self.records("metrics"):
                    self._metrics_until |= dict.fromkeys(record["values"], record["step"])
            fresh = {name: value for name, value in values.items() if step > self._metrics_until.get(name, -1)}
            if fresh:
                self._metrics_until |= dict.fromkeys(fresh, step)
                self._write("metrics", step=step, values=fresh)

    def again(self, values: dict[str, float]) -> None:
        """Values that belong to no step, and may be measured again: each counts up from 0."""
        measured = sum(1 for record in self.records("metrics") if set(values) <= set(record["values"]))
        self._write("metrics", step=measured, values=values)

    def params(self, values: dict[str, Any]) -> None:
        """Parameters, by their dotted names."""
        self._write("params", values={name: str(value)[:PARAM_LENGTH] for name, value in values.items()})

    def tags(self, values: dict[str, str]) -> None:
        """Tags; a later value of a name takes the place of the earlier one."""
        self._write("tags", values={name: value[:TAG_LENGTH] for name, value in values.items()})

    def name(self, name: str, restored: bool = False) -> None:
        """What the run is called, and the MLflow experiment that it belongs to.

        Args:
            name: for people.
            restored: the training left no journal here; only later stages did.
        """
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        self._write("name", name=name, experiment=experiment, restored=restored)

    def dataset(self, name: str, source: str, digest: str, profile: dict[str, int]) -> None:
        """What was read: its name, where it lies, its digest, and its numbers of characters."""
        self._write("dataset", name=name, source=source, digest=digest, profile=profile)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder, kept beside the journal; it appears in the run under ``folder``.

        A file that is recorded already, with the same bytes, is not recorded again.
        """
        recorded = {record["path"]: record.get("digest") for record in self.records("artifact")}
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_dir():
                continue
            place = PurePosixPath(folder, path.name, file.relative_to(path).as_posix()).as_posix()
            kept, digest = self.folder / "artifacts" / place, hashlib.sha256(file.read_bytes()).hexdigest()
            if recorded.get(place) == digest and kept.exists():
                continue
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
            shutil.copyfile(file, temporary)
            files.fsync(temporary)
            temporary.replace(kept)
            self._write("artifact", path=place, digest=digest)

    def status(self, status: str) -> None:
        """``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._write("status", status=status)

    def flush(self) -> None:
        """Have all that was written on the disk itself, where a power cut leaves it."""
        if (self.folder / "journal.jsonl").exists():
            files.fsync(self.folder / "journal.jsonl")
            files.fsync(self.folder)

    def _write(self, kind: str, **fields: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"kind": kind, "time": int(time.time() * 1000), **fields}
        with locked(self.folder / "journal.jsonl") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):  # a crash or a full disk has left half a line
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read and to append to, while no other thread or process has it so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
