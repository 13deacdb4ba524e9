"""A text encoded to token files on disk, by all cores and in bounded memory.

1. Cut the text into pieces that can be read independently (:mod:`minigpt.data.text`).
2. Scan: collect the distinct code points of each piece and count its characters. This gives the vocabulary and the
   position of each piece in the token files.
3. Write: encode each piece at its position, so the files do not depend on the number of processes.
4. Hash the token files and the vocabulary, to detect damage and to identify the data of a run.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt.data.text import CHUNK_BYTES, Span, changed_error, find_text_files, read_piece, split_into_pieces
from minigpt.data.tokenizer import CODE_POINTS, Tokenizer, describe_character
from minigpt.errors import UserError
from minigpt.files import write_json
from minigpt.runtime.cpu import available_cores

MIN_PARALLEL_BYTES = 1 << 27
"""Size of a text in bytes from which several processes encode it. Below, starting them costs more than they save."""

HASH_BLOCK_BYTES = 1 << 24
"""Bytes of a token file that one task hashes. The digest depends on this number."""

SPLITS = ("train.npy", "val.npy")

Map = Callable[..., Iterable[Any]]
"""The built-in ``map``, or one with the same signature that runs in several processes."""


def encode_corpus(
    source: Path, val_fraction: float, folder: Path, normalize: str = "none", workers: int | None = None
) -> tuple[Tokenizer, int, int]:
    """Encode a text and write train.npy, val.npy, tokenizer.json and digest.json to an existing ``folder``.

    The text is the file ``source``, or the .txt files of that folder, in the normal form ``normalize`` (NFC or none).
    The validation split is the last ``val_fraction`` of its characters. By default, ``workers`` is 1 for a short text,
    else the number of cores available to this process.

    Returns:
        the tokenizer, and the numbers of characters of the training and the validation split.

    Raises:
        UserError: the text is missing, empty, not UTF-8, too short to split or changed; or a process was killed.
    """
    paths = find_text_files(source)
    before = [path.stat() for path in paths]
    size = sum(stat.st_size for stat in before)
    pieces = list(split_into_pieces(paths, normalize))
    if workers is None:
        workers = len(available_cores()) if size >= MIN_PARALLEL_BYTES else 1
    # The text is read twice. Without a terminal, and during the first second, no bar is shown.
    bar = tqdm(total=2 * size, unit="B", unit_scale=True, delay=1, disable=None)
    with worker_pool(min(workers, len(pieces)), source) as run, bar:
        found = survey(source, pieces, val_fraction, normalize, run=run, progress=bar.update)
        tokenizer, counts, n_train = found.tokenizer, found.counts, found.n_train
        tokenizer.save(folder / "tokenizer.json")
        for name, length in zip(SPLITS, (n_train, sum(counts) - n_train), strict=True):
            np.lib.format.open_memmap(folder / name, "w+", tokenizer.dtype, (length,))  # a sparse file of zeros
        starts = [0, *accumulate(counts)][:-1]
        for piece, _ in zip(pieces, run(partial(_write, folder, source), pieces, starts, counts), strict=True):
            bar.update(sum(map(len, piece)))
        for path, stat in zip(paths, before, strict=True):
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise changed_error(path)
        sizes = {name: (folder / name).stat().st_size for name in SPLITS}
        write_json(folder / "digest.json", {"sha256": digest(folder, tokenizer, sizes, run), "bytes": sizes})
    return tokenizer, n_train, sum(counts) - n_train


@dataclass(frozen=True)
class Survey:
    """First reading of a text: its vocabulary, the characters of each piece, and those of the training split."""

    tokenizer: Tokenizer
    counts: list[int]
    n_train: int


def survey(
    source: Path,
    pieces: list[list[Span]],
    val_fraction: float,
    normalize: str,
    *,
    run: Map = map,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> Survey:
    """Read the pieces of a text, and raise a UserError if there is too little to train on."""
    seen, counts = np.zeros(CODE_POINTS, dtype=np.bool_), []
    for piece, (points, count) in zip(pieces, run(partial(_scan, normalize), pieces), strict=True):
        seen[points] = True
        counts.append(count)
        progress(sum(map(len, piece)))
    total = sum(counts)
    if not total:
        raise UserError(f"{source}: empty; there is nothing to train on")
    n_train = int(total * (1 - val_fraction))
    if n_train < 2 or total - n_train < 2:
        raise UserError(f"{source}: {total} characters are too few to split (data.val_fraction = {val_fraction})")
    tokenizer = Tokenizer.from_seen(seen, normalize)
    if tokenizer.vocab_size == 1:
        character = describe_character(tokenizer.characters)
        raise UserError(f"{source}: has no character other than {character}; there is nothing to learn")
    return Survey(tokenizer, counts, n_train)


def _scan(normalize: str, piece: list[Span]) -> tuple[NDArray[Any], int]:
    """Return the distinct code points of a piece and its number of characters."""
    seen, seen_ascii, count = np.zeros(CODE_POINTS, dtype=np.bool_), b"", 0
    for points in read_piece(piece, normalize):
        count += len(points)
        if points.dtype == np.uint8:
            if new := points.tobytes().translate(None, seen_ascii):
                seen_ascii += bytes(set(new))
        elif not seen.take(points, mode="clip").all():  # reading is three times as fast as marking
            seen[points] = True
    seen[list(seen_ascii)] = True
    return np.flatnonzero(seen), count


def _write(folder: Path, source: Path, piece: list[Span], start: int, count: int) -> None:
    """Write the ids of a piece with ``count`` characters that starts at character ``start`` of the text."""
    tokenizer, position = Tokenizer.load(folder / "tokenizer.json"), start
    with (folder / SPLITS[0]).open("r+b", buffering=0) as train, (folder / SPLITS[1]).open("r+b", buffering=0) as val:
        np.lib.format.read_magic(train), np.lib.format.read_magic(val)
        (n_train,), _, dtype = np.lib.format.read_array_header_1_0(train)
        np.lib.format.read_array_header_1_0(val)
        train.seek(min(start, n_train) * dtype.itemsize, os.SEEK_CUR)
        val.seek(max(0, start - n_train) * dtype.itemsize, os.SEEK_CUR)
        for points in read_piece(piece, tokenizer.normalize):
            ids = tokenizer.encode_known(points)
            in_train = max(0, n_train - position)
            train.write(ids[:in_train].data)
            val.write(ids[in_train:].data)
            position += len(ids)
    if position - start != count:
        raise changed_error(source)


def digest(folder: Path, tokenizer: Tokenizer, sizes: dict[str, int], run: Map = map) -> str:
    """Return the hexadecimal SHA-256 of the vocabulary and of each block's SHA-256, for files of ``sizes`` bytes."""
    result = hashlib.sha256(tokenizer.characters.encode("utf-32-le", "surrogatepass"))
    for name, size in sizes.items():
        for block in run(partial(_hash_block, folder / name), range(0, size, HASH_BLOCK_BYTES)):
            result.update(block)
    return result.hexdigest()


def _hash_block(path: Path, begin: int) -> bytes:
    result = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        for _ in range(0, HASH_BLOCK_BYTES, CHUNK_BYTES):
            result.update(file.read(CHUNK_BYTES))
    return result.digest()


@contextmanager
def worker_pool(count: int, source: Path) -> Iterator[Map]:
    """Yield a ``map`` that runs in ``count`` processes and keeps the order, or the built-in one if ``count`` is 1.

    The processes end with the block, and also with this process if it is killed. If one is killed, that is a UserError.
    """
    if count <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), _start_worker)

    def run(function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterable[Any]:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return pool.map(function, *arguments)
        # The workers start in this call and inherit the mask. So Ctrl-C, which a terminal sends to all processes,
        # interrupts only this one, even while a worker is starting.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        yield run
    except BrokenProcessPool:
        raise UserError(
            f"{source}: an encoding process was killed, perhaps because memory ran out; "
            f"fewer cores need less memory, for example `taskset -c 0 dvc repro`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ignore Ctrl-C, and exit when the parent process has ended, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
