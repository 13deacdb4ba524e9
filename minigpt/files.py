"""Atomic writes: a directory appears complete or not at all, also after a crash."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def workspace() -> Path:
    """Return the main workspace. DVC runs queued experiments in temporary copies."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, and rename it to ``target`` when the block succeeds.

    On an error, the temporary directory is removed and ``target`` stays unchanged. Every file is on the disk before the
    rename. Remains of a killed process are removed, so two processes must not write the same target concurrently.
    """
    folder, old = target.with_name(f".{target.name}-new.tmp"), target.with_name(f".{target.name}-old.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    for remains in target.parent.glob(f".{target.name}-*.tmp"):
        shutil.rmtree(remains)
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            fsync(path)
        fsync(folder)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        if old.exists():
            shutil.rmtree(old)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, with non-ASCII characters as they are and floats with all digits."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV, with the keys as the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
