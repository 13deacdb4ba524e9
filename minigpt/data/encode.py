"""A text encoded to token files on disk, by all cores and in bounded memory.

1. Cut the text into pieces that can be read independently (:mod:`minigpt.data.text`).
2. Scan: collect the distinct code points of each piece and count the characters of each file. This gives the vocabulary
   and the place of each character in the token files (:mod:`minigpt.data.splits`).
3. Write: encode each piece at its place, so the token files do not depend on the number of processes.
4. Hash the token files and the vocabulary, to detect damage and to identify the data of a run.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minigpt.data.splits import Layout, Segment, SplitRule, count_files, lay_out, overlapping, save_files
from minigpt.data.text import CHUNK_BYTES, Span, changed_error, find_text_files, read_piece, split_into_pieces
from minigpt.data.tokenizer import CODE_POINTS, Tokenizer, describe_character
from minigpt.errors import UserError
from minigpt.files import write_json
from minigpt.params import SplitKind
from minigpt.runtime.cpu import available_cores

MIN_PARALLEL_BYTES = 1 << 27
"""Size of a text in bytes from which several processes encode it. Below, starting them costs more than they save."""

HASH_BLOCK_BYTES = 1 << 24
"""Bytes of a token file that one task hashes. The digest depends on this number."""

SPLITS = ("train.npy", "val.npy")
TEST = "test.npy"
"""Token files of every corpus, and the token file of a test split."""

Map = Callable[..., Iterable[Any]]
"""The built-in ``map``, or one with the same signature that runs in several processes."""


def encode_corpus(
    source: Path,
    val_fraction: float,
    folder: Path,
    normalize: str = "none",
    workers: int | None = None,
    *,
    test_fraction: float = 0.0,
    split: SplitKind = "end",
) -> tuple[Tokenizer, dict[str, int]]:
    """Encode a text and write its tokens, tokenizer.json and digest.json to an existing ``folder``.

    The text is the file ``source``, or the .txt files of that folder, in the normal form ``normalize`` (NFC or none).
    The test split is the last ``test_fraction`` of its characters, and the validation split is the ``val_fraction``
    before it. With the ``split`` each_file, they are the ends of each file. The tokens are train.npy, val.npy and, if
    there is a test split, test.npy. For several files, files.json has the characters of each. By default, ``workers``
    is 1 for a short text, else the number of cores available to this process.

    Returns:
        the tokenizer, and the number of characters of each split by its name.

    Raises:
        UserError: the text is missing, empty, not UTF-8, too short to split or changed; or a process was killed.
    """
    paths = find_text_files(source)
    before = [path.stat() for path in paths]
    size = sum(stat.st_size for stat in before)
    pieces = list(split_into_pieces(paths, normalize))
    if workers is None:
        workers = len(available_cores()) if size >= MIN_PARALLEL_BYTES else 1
    rule = SplitRule(val_fraction, test_fraction, split)
    # The text is read twice. Without a terminal, and during the first second, no bar is shown.
    bar = tqdm(total=2 * size, unit="B", unit_scale=True, delay=1, disable=None)
    with worker_pool(min(workers, len(pieces)), source) as run, bar:
        found = survey(source, pieces, rule, normalize, run=run, progress=bar.update)
        found.tokenizer.save(folder / "tokenizer.json")
        _write_tokens(source, pieces, found, folder, run=run, progress=bar.update)
        for path, stat in zip(paths, before, strict=True):
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise changed_error(path)
        if len(found.layout.files) > 1:
            save_files(folder, found.layout.files)
        sizes = {f"{name}.npy": (folder / f"{name}.npy").stat().st_size for name in found.layout.sizes}
        write_json(folder / "digest.json", {"sha256": digest(folder, found.tokenizer, sizes, run), "bytes": sizes})
    return found.tokenizer, found.layout.sizes


@dataclass(frozen=True)
class Survey:
    """First reading of a text: its vocabulary, the characters of each piece, and the place of all of them."""

    tokenizer: Tokenizer
    counts: list[int]
    layout: Layout


def survey(
    source: Path,
    pieces: list[list[Span]],
    rule: SplitRule,
    normalize: str,
    *,
    run: Map = map,
    progress: Callable[[int], object] = lambda _bytes: None,
) -> Survey:
    """Read the pieces of a text, and raise a UserError if there is too little to train on."""
    seen, counts = np.zeros(CODE_POINTS, dtype=np.bool_), list[list[int]]()
    for piece, (points, numbers) in zip(pieces, run(partial(_scan, normalize), pieces), strict=True):
        seen[points] = True
        counts.append(numbers)
        progress(sum(map(len, piece)))
    layout = lay_out(count_files(source, pieces, counts), rule)
    total = sum(layout.sizes.values())
    if not total:
        raise UserError(f"{source}: empty; there is nothing to train on")
    if min(layout.sizes.values()) < 2:
        raise UserError(f"{source}: {total} characters are too few to split ({rule})")
    tokenizer = Tokenizer.from_seen(seen, normalize)
    if tokenizer.vocab_size == 1:
        character = describe_character(tokenizer.characters)
        raise UserError(f"{source}: has no character other than {character}; there is nothing to learn")
    return Survey(tokenizer, [sum(numbers) for numbers in counts], layout)


def _write_tokens(
    source: Path, pieces: list[list[Span]], found: Survey, folder: Path, *, run: Map, progress: Callable[[int], object]
) -> None:
    """Write the token file of each split."""
    for name, length in found.layout.sizes.items():  # sparse files of zeros
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", found.tokenizer.dtype, (length,))
    places = list(pairwise([0, *accumulate(found.counts)]))
    # Only the segments of a piece are sent to the process that writes it: a folder may have many files.
    segments = (overlapping(found.layout.segments, *place) for place in places)
    for piece, _ in zip(pieces, run(partial(_write, folder, source), pieces, places, segments), strict=True):
        progress(sum(map(len, piece)))


def _scan(normalize: str, piece: list[Span]) -> tuple[NDArray[Any], list[int]]:
    """Return the distinct code points of a piece, and the number of characters of each of its spans.

    A span can be read alone: it starts at a safe cut or, if it starts a file, after a newline, with which nothing
    composes.
    """
    seen, seen_ascii, counts = np.zeros(CODE_POINTS, dtype=np.bool_), b"", []
    for span in piece:
        counts.append(0)
        for points in read_piece([span], normalize):
            counts[-1] += len(points)
            if points.dtype == np.uint8:
                if new := points.tobytes().translate(None, seen_ascii):
                    seen_ascii += bytes(set(new))
            elif not seen.take(points, mode="clip").all():  # reading is three times as fast as marking
                seen[points] = True
    seen[list(seen_ascii)] = True
    return np.flatnonzero(seen), counts


def _write(folder: Path, source: Path, piece: list[Span], place: tuple[int, int], segments: list[Segment]) -> None:
    """Write the ids of a piece, which are the characters [begin, end) of the text if ``place`` is (begin, end)."""
    tokenizer, position = Tokenizer.load(folder / "tokenizer.json"), place[0]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{name}.npy").open("r+b", buffering=0))
            for name in {segment.name for segment in segments}
        }
        headers = {name: _header_bytes(file) for name, file in files.items()}
        for points in read_piece(piece, tokenizer.normalize):
            ids = tokenizer.encode_known(points)
            end = position + len(ids)
            for segment in overlapping(segments, position, end):
                begin = max(position, segment.begin)
                offset = segment.position + begin - segment.begin
                files[segment.name].seek(headers[segment.name] + offset * ids.itemsize)
                files[segment.name].write(ids[begin - position : segment.end - position].data)
            position = end
    if position != place[1]:
        raise changed_error(source)


def _header_bytes(file: BinaryIO) -> int:
    """Return the size of the header of an open .npy file."""
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell()


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
