"""Files that appear whole or not at all: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside ``target``; on success it takes the place of ``target``.

    On an error the temporary folder is removed and ``target`` stays as it was. Every file is on the disk
    before the rename. What a killed process left of an earlier try is removed; two processes must not write
    the same target at once.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}-*.tmp"):
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent))
    try:
        os.chmod(folder, 0o777 & ~_umask())
        yield folder
        for path in folder.rglob("*"):
            fsync(path)
        fsync(folder)
        if target.exists():
            old = folder.with_name(f".{target.name}-old.tmp")
            os.rename(target, old)
            os.rename(folder, target)
            shutil.rmtree(old)
        else:
            os.rename(folder, target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON: characters stay readable, floats keep all their digits."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV, the keys above."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def workspace() -> Path:
    """The main workspace: DVC runs queued experiments in copies of it, which vanish."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()
