"""TODO."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minigpt.data.text import CHUNK, Span, _changed, pieces, read, text_files
from minigpt.data.tokenizer import CODE_POINTS, Tokenizer
from minigpt.errors import UserError
from minigpt.files import write_json
from minigpt.runtime.cpu import available_cores

if TYPE_CHECKING:
    pass

PARALLEL = 1 << 27
"""Bytes from which on a text is worth the start of further processes."""

BLOCK = 1 << 24
"""Bytes of a file that are hashed at a time, each on their own."""

SPLITS = ("train.npy", "val.npy")


def encode(
    source: Path, val_fraction: float, folder: Path, normalize: str = "none", workers: int | None = None
) -> tuple[Tokenizer, int, int]:
    """Encode a text to ``folder``: train.npy, val.npy, tokenizer.json and digest.json.

    The text is cut into pieces. In a first pass each gives its characters and their number, and so the vocabulary and
    the place of its ids; in a second it writes them there. What is written does not depend on the number of processes,
    and memory does not grow with the text. Validation is the text's end. The text is put in the normal form
    ``normalize``, NFC or none.

    Args:
        source: a file or a folder.
        val_fraction: share of the characters.
        folder: where to.
        normalize: NFC or none.
        workers: processes; by default one for each core that this process may use, and one alone for a short text.

    Returns:
        the tokenizer, and the number of characters of train and val.

    Raises:
        UserError: the text is missing, empty, not UTF-8, or too short to be split; it changed; a process was killed.
    """
    paths = text_files(source)
    found = [path.stat() for path in paths]
    size = sum(file.st_size for file in found)
    work = list(pieces(paths, normalize))
    if workers is None:
        workers = len(available_cores()) if size >= PARALLEL else 1
    with processes(min(workers, len(work)), source) as run, progress(2 * size) as told:
        seen, counts = np.zeros(CODE_POINTS, dtype=np.bool_), []
        for piece, (points, count) in zip(work, run(partial(_scan, normalize), work), strict=True):
            seen[points] = True
            counts.append(count)
            told(piece)
        total = sum(counts)
        if not total:
            raise UserError(f"{source}: empty; there is nothing to learn from")
        n_train = int(total * (1 - val_fraction))
        if n_train < 2 or total - n_train < 2:
            raise UserError(f"{source}: {total} characters are too few to split (data.val_fraction = {val_fraction})")
        tokenizer = Tokenizer.of(seen, normalize)
        tokenizer.save(folder / "tokenizer.json")
        for name, length in zip(SPLITS, (n_train, total - n_train), strict=True):
            _make(folder / name, length, tokenizer.dtype)
        places = [0, *accumulate(counts)]
        for piece, count, written in zip(work, counts, run(partial(_write, folder), work, places[:-1]), strict=True):
            if written != count:
                raise _changed(source)
            told(piece)
        for path, before in zip(paths, found, strict=True):
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise _changed(path)
        sizes = {name: (folder / name).stat().st_size for name in SPLITS}
        write_json(folder / "digest.json", {"sha256": digest(folder, tokenizer, sizes, run), "bytes": sizes})
    return tokenizer, n_train, total - n_train


def _scan(normalize: str, piece: list[Span]) -> tuple[NDArray[Any], int]:
    """The different code points of a piece, and how many there are in all."""
    seen, of_ascii, count = np.zeros(CODE_POINTS, dtype=np.bool_), b"", 0
    for points in read(piece, normalize):
        count += len(points)
        if points.dtype == np.uint8:
            if new := points.tobytes().translate(None, of_ascii):
                of_ascii += bytes(set(new))
        elif not seen.take(points, mode="clip").all():  # reading is three times as fast as marking
            seen[points] = True
    seen[list(of_ascii)] = True
    return np.flatnonzero(seen), count


def _make(path: Path, length: int, dtype: np.dtype[Any]) -> None:
    """A file for ids, all of them 0."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + length * dtype.itemsize)


def _write(folder: Path, piece: list[Span], place: int) -> int:
    """Write the ids of a piece, the first of them at ``place`` of the text; gives their number."""
    tokenizer, written = Tokenizer.load(folder / "tokenizer.json"), place
    with (folder / SPLITS[0]).open("r+b", buffering=0) as train, (folder / SPLITS[1]).open("r+b", buffering=0) as val:
        np.lib.format.read_magic(train), np.lib.format.read_magic(val)
        (n_train,), _, dtype = np.lib.format.read_array_header_1_0(train)
        np.lib.format.read_array_header_1_0(val)
        train.seek(min(place, n_train) * dtype.itemsize, os.SEEK_CUR)
        val.seek(max(0, place - n_train) * dtype.itemsize, os.SEEK_CUR)
        for points in read(piece, tokenizer.normalize):
            ids = tokenizer.encode_known(points)
            cut = max(0, n_train - written)
            train.write(ids[:cut].data)
            val.write(ids[cut:].data)
            written += len(ids)
    return written - place


def digest(folder: Path, tokenizer: Tokenizer, sizes: dict[str, int], run: Callable[..., Iterable[Any]] = map) -> str:
    """SHA-256, in hexadecimal, over the vocabulary and the SHA-256 of each block of the splits' files."""
    result = hashlib.sha256(tokenizer.characters.encode("utf-32-le", "surrogatepass"))
    for name, size in sizes.items():
        for block in run(partial(_hash, folder / name), range(0, size, BLOCK)):
            result.update(block)
    return result.hexdigest()


def _hash(path: Path, begin: int) -> bytes:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        for _ in range(0, BLOCK, CHUNK):
            hashed.update(file.read(CHUNK))
    return hashed.digest()


@contextmanager
def processes(count: int, source: Path) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a ``map`` that runs in ``count`` processes, in this one alone if that is 1. Results keep their order.

    The processes end with the block, and with this process, whatever ends it.

    Raises:
        UserError: one of them was killed.
    """
    if count <= 1:
        yield map
        return
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent)

    def run(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterable[Any]:
        # All processes start here, and keep the mask: the interrupt of a terminal is this process's to answer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield run
    except BrokenProcessPool:
        raise UserError(
            f"{source}: a process that encoded it was killed, perhaps for want of memory; "
            f"with fewer cores it takes less: for example `taskset -c 0 dvc repro`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end when the one that started it has ended, even where that one was killed."""
    from multiprocessing import parent_process

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


@contextmanager
def progress(size: int) -> Iterator[Callable[[list[Span]], object]]:
    """Give a function that is told of each piece that was read; a long text shows a bar in a terminal."""
    if size < 2 * PARALLEL:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        yield lambda piece: bar.update(sum(span.end - span.begin for span in piece))
