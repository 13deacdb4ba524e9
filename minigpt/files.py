"""JSON files that may be damaged, and atomic writes: a file or directory appears complete or not at all."""

import csv
import errno
import glob
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from minigpt.errors import UserError

LARGEST_JSON = 64 << 20
"""Bytes of the largest JSON file that is read: a vocabulary of all code points has a quarter of it."""

NOT_REGULAR = "not a regular file"

PREPARED, MODEL, RESULTS = Path("data/prepared"), Path("models/gpt"), Path("results")
"""Outputs of the stages, below the root of the repository. Each stage but the first has a folder in ``results``."""


def workspace() -> Path:
    """Return the main workspace. DVC runs queued experiments in temporary copies."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def require_root() -> None:
    """Raise a UserError unless the working directory is the root of a repository."""
    if not Path(".dvc").is_dir():
        raise UserError(".dvc: no such folder; run this from the root of the repository")


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(*targets: Path) -> None:
    """Create the parents of folders that will be replaced; raise an OSError if one of them cannot be replaced."""
    mounts = {part.mountpoint for part in psutil.disk_partitions(all=True)}  # os.path.ismount misses bind mounts
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(target.resolve()) in mounts:
            problem = "it is a mount point, which cannot be replaced; mount the folder above it instead"
            raise OSError(errno.EBUSY, problem, str(target))
        if not os.access(target.parent, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unless_file(path: Path) -> None:
    """Remove a folder, pipe or link in the place of a file of this project, which no version of it has made."""
    if path.is_symlink() or not path.is_file():
        remove(path)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes, or raise OSError: a pipe would wait for ever, a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code, problem = (errno.EISDIR, os.strerror(errno.EISDIR)) if stat.S_ISDIR(mode) else (errno.EINVAL, NOT_REGULAR)
        raise OSError(code, problem, str(path))
    return os.fdopen(descriptor, "rb")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, and rename it to ``target`` when the block succeeds.

    On an error, the temporary directory is removed and ``target`` stays unchanged. Every file is on the disk before the
    rename. Remains of a killed process are removed, so two processes must not write the same target concurrently. If
    ``target`` is a link to a folder, that folder is replaced.
    """
    if target.is_symlink():
        resolved = Path(os.path.realpath(target))
        if resolved.is_symlink():  # a link to itself
            target.unlink()
        else:
            target = resolved
    check_replaceable(target)
    folder, old = target.with_name(f".{target.name}-new.tmp"), target.with_name(f".{target.name}-old.tmp")
    _restore(old, target)  # of a process that was killed between the two renames
    for remains in target.parent.glob(f".{glob.escape(target.name)}-*.tmp"):
        remove(remains)
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            fsync(path)
        fsync(folder)
        if target.exists():
            target.rename(old)
        folder.rename(target)
        remove(old)
        fsync(target.parent)
    except BaseException:
        _restore(old, target)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _restore(old: Path, target: Path) -> None:
    """Rename ``old`` back to ``target`` if nothing has taken its place."""
    if old.exists() and not target.exists():
        old.rename(target)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that a crash leaves as it was or complete. It replaces a directory of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        fsync(temporary)
        if path.is_dir():
            remove(path)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def read_json(path: Path) -> Any:
    """Read a regular file with JSON. Raise OSError or ValueError for any other file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is {NOT_REGULAR}")
    try:
        with open_file(path) as file:
            return json.loads(file.read())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def read_run_key(path: Path) -> str:
    """Return the key of the MLflow run that a file run.json names. Raise OSError or ValueError if it names none."""
    content = read_json(path)
    key = content.get("run") if isinstance(content, dict) else None
    if not is_run_key(key):
        raise ValueError(f'expected {{"run": 32 hexadecimal digits}}, got {content!r:.50}')
    return str(key)


def is_run_key(value: object) -> bool:
    """Return whether a value is the key of a run. Only a key may become a part of a path."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def require_file(path: Path, largest: int | None = None) -> None:
    """Raise a UserError unless ``path`` is a regular file of at most ``largest`` bytes; a FIFO would block."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    if not path.is_file():
        raise UserError(f"{path}: expected a file, but this is {'a folder' if path.is_dir() else 'none'}")
    if largest is not None and size > largest:
        raise UserError(f"{path}: {size:,} bytes are too many; expected at most {largest:,}")


def require_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file. ``what`` names this content in the UserError for any other file."""
    require_file(path, LARGEST_JSON)
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not {what}: {' '.join(str(error).split())}") from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, with non-ASCII characters as they are and floats with all digits."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_csv(text: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV table, with numbers as floats, and None for an empty cell."""

    def parse(cell: Any) -> Any:
        try:
            return float(cell)
        except (ValueError, TypeError):  # text, or a list of the cells that are too many
            return cell or None

    return [{name: parse(cell) for name, cell in row.items()} for row in csv.DictReader(io.StringIO(text))]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV, with the keys as the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
