"""Tokens: a text encoded to disk in two passes, by all cores, and read back in batches or as an exact sweep."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import signal
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import UserError
from minigpt.files import write_json
from minigpt.process import cores
from minigpt.tokenizer import CODE_POINTS, Tokenizer, code_points

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

Result = TypeVar("Result")

CHUNK = 1 << 16
"""Bytes decoded at a time: few enough to stay in a core's cache, and often all ASCII."""

PIECE = 1 << 25
"""Bytes of a text, of one file or of several, that one process reads at a time."""

PARALLEL = 1 << 27
"""Bytes from which on a text is worth the start of further processes."""

BLOCK = 1 << 24
"""Bytes of a file that are hashed at a time, each on their own."""

IN_MEMORY = 1 << 28
"""Bytes up to which a split is taken to stay in memory once it was read."""

SPLITS = ("train.npy", "val.npy")

SWEEP_CHARS = {"cpu": 1 << 13, "cuda": 1 << 16}
"""Characters of a batch of an exact sweep, by device."""


def text_files(source: Path) -> list[Path]:
    """The text file ``source``, or the .txt files in the folder ``source`` and below it, in order of their names.

    Raises:
        UserError: there is none.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*.txt") if path.is_file())
        if not files:
            raise UserError(f"{source}: no .txt file in this folder (data.source in params.yaml)")
        return files
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder (data.source in params.yaml)")
    return [source]


@dataclass(frozen=True)
class Span:
    """A part of a text file that can be read on its own, from one border to another.

    Attributes:
        path: the file.
        begin, end: its bytes, at least one character.
        joined: whether a newline is put before, since the file's first byte follows a file that does not end in one.
    """

    path: str
    begin: int
    end: int
    joined: bool = False


def border(data: bytes, normalize: str) -> int:
    """The last place inside ``data``, UTF-8 that goes on after it, where it can be cut; 0 where there is none.

    That is before a character, and not within a line end. Where texts are put in the form NFC it is before a
    character of ASCII, which is never composed with what stands before it.
    """
    for place in range(len(data) - 1, 0, -1):
        follows = data[place] >= 0x80 if normalize == "NFC" else data[place] & 0xC0 == 0x80
        if not follows and data[place - 1 : place + 1] != b"\r\n":
            return place
    return 0


def pieces(paths: list[Path], normalize: str) -> Iterator[list[Span]]:
    """Texts, one after the other, as pieces of about PIECE bytes that can be read apart."""
    piece: list[Span] = []
    room, newline = PIECE, True
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = 0
            if size <= len(codecs.BOM_UTF8) and _bytes(file, 0, size) in (b"", codecs.BOM_UTF8):
                continue
            while begin < size:
                end = begin + room
                place = 0
                while end < size and not place:
                    start = max(begin, end - CHUNK)
                    place = border(_bytes(file, start, end), normalize)
                    end = start + place if place else end + PIECE
                end = min(end, size)
                piece.append(Span(str(path), begin, end, joined=not begin and not newline))
                room -= end - begin
                begin = end
                if room <= CHUNK:
                    yield piece
                    piece, room = [], PIECE
            newline = _bytes(file, size - 1, size) in (b"\n", b"\r")
    if piece:
        yield piece


def _bytes(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def read(piece: list[Span], normalize: str = "none") -> Iterator[NDArray[Any]]:
    """The code points of a piece in chunks: without byte order marks, every line end as one newline, normalized.

    Raises:
        UserError: a file is not text in UTF-8, and the offending byte's offset is named; or it has become shorter.
    """
    for span in piece:
        if span.joined:
            yield code_points("\n")
        with open(span.path, "rb", buffering=0) as file:
            place, held = file.seek(span.begin), b""
            while place < span.end:
                data = file.read(min(CHUNK, span.end - place - len(held)))
                if not data:
                    raise _changed(span.path)
                held += data
                cut = len(held) if place + len(held) == span.end else border(held, normalize)
                if not cut:
                    _decode(span.path, place, held, whole=False)  # what is no text is not held until memory ends
                    continue
                data, held = held[:cut], held[cut:]
                text = _decode(span.path, place, data)
                if b"\r" in data:
                    text = text.replace("\r\n", "\n").replace("\r", "\n")
                yield code_points(unicodedata.normalize("NFC", text) if normalize == "NFC" else text)
                place += cut


def _decode(path: str, offset: int, data: bytes, whole: bool = True) -> str:
    """The text of ``data``, which stands at ``offset`` in a file; the end of its last character may be missing."""
    nul = data.find(b"\0")
    try:
        text, _ = codecs.utf_8_decode(data if nul < 0 else data[:nul], "strict", whole or nul >= 0)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}, {error.reason}); "
            f"save it as UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None
    if nul >= 0:
        raise UserError(f"{path}: a binary file, not text: NUL at byte {offset + nul}")
    return text.removeprefix("\ufeff") if offset == 0 else text


def _changed(path: str | Path) -> UserError:
    return UserError(f"{path}: changed while it was read; run again")


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
        workers = len(cores()) if size >= PARALLEL else 1
    with processes(min(workers, len(work)), source) as run, progress(2 * size) as told:
        seen, counts = np.zeros(CODE_POINTS, dtype=np.bool_), []
        for piece, (points, count) in zip(work, run(partial(_survey, normalize), work), strict=True):
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


def _survey(normalize: str, piece: list[Span]) -> tuple[NDArray[Any], int]:
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


Words = np.ndarray[Any, np.dtype[np.uint64]]


def mix(words: Words) -> Words:
    """A hash of 64-bit words: the output function of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def shuffled(places: Words, n: int, keys: Words) -> Words:
    """Where each of ``places``, in [0, n), goes in the permutation of range(n) that its key chooses.

    A Feistel network over the next larger domain of 4^k numbers; what leaves [0, n) goes through it again until it is
    back (Black and Rogaway 2002). So a permutation of any length takes no memory.
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = places.copy()
    outside = np.ones(len(places), dtype=np.bool_)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & low
        for number in range(6):
            left, right = right, left ^ (mix(right ^ mix(keys[outside] + np.uint64(number))) & low)
        result[outside] = left << half | right
        outside = result >= n
    return result


@dataclass(frozen=True)
class Sweep:
    """Part of an exact sweep: windows of one length, as a batch.

    Attributes:
        ids: what the model reads, shape (B, T).
        targets: the character after each, shape (B, T).
        skip: how many leading targets of each window an earlier window has scored already.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    skip: int


class Split:
    """The tokens of one split.

    Args:
        tokens: integer ids, shape (n,), on any device; on a CPU usually a memory map.
        file: where they stand on the disk, if batches shall be read from there, and not through the map: so a file
            that has gone is an error and does not end the process, and no page of it counts as the process's memory.
        device: where batches go, from a file; else to the device of the tokens.
    """

    def __init__(
        self, tokens: torch.Tensor, file: Path | None = None, device: torch.device | str | None = None
    ) -> None:
        import torch

        self.tokens = tokens
        self.device = torch.device(device) if device is not None else tokens.device
        self._file = file.open("rb", buffering=0) if file else None
        self._header = file.stat().st_size - tokens.nbytes if file else 0
        self._ahead: tuple[tuple[int, ...], Future[torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(
        self, seed: int, first: int, batch_size: int, block_size: int, ahead: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows ``first`` to ``first + batch_size - 1`` of an endless stream that the arguments alone decide.

        The stream runs through the split in epochs. In each, the split is cut into windows that do not overlap, from
        an offset of its own, and they come in an order of their own: all are read equally often, which leaves less
        to learn twice, and more once, than windows at random places.

        Args:
            seed: of the training.
            first: windows that the training has read before.
            batch_size: windows B.
            block_size: characters T of a window.
            ahead: how many windows after this batch's first the next begins; 0 where that is not known. From a file
                it is read in a thread of its own while this one is computed with. It changes no batch.

        Returns:
            ids and targets of type int64, both of shape (B, T), on ``device``.

        Raises:
            UserError: the file has become shorter.
            OSError: it cannot be read.
        """
        if not self._file:
            windows = self._gather(self._begins(seed, first, batch_size, block_size), block_size + 1)
            return windows[:, :-1], windows[:, 1:]
        asked = (seed, first, batch_size, block_size)
        known, reading = self._ahead or ((), None)
        windows = reading.result() if reading and known == asked else self._read_batch(*asked)
        following = (seed, first + ahead, batch_size, block_size)
        self._ahead = (following, in_thread(self._read_batch, *following)) if ahead else None
        windows = self._sent(windows)
        return windows[:, :-1], windows[:, 1:]

    def _read_batch(self, seed: int, first: int, batch_size: int, block_size: int) -> torch.Tensor:
        return self._read(self._begins(seed, first, batch_size, block_size), block_size + 1)

    def _begins(self, seed: int, first: int, batch_size: int, block_size: int) -> NDArray[np.int64]:
        per_epoch = max(1, (len(self) - block_size) // block_size)
        epochs, places = np.divmod(np.arange(first, first + batch_size, dtype=np.uint64), np.uint64(per_epoch))
        keys = mix(mix(epochs) ^ np.uint64(seed))
        offsets = mix(keys) % np.uint64(len(self) - per_epoch * block_size)
        begins = offsets + shuffled(places, per_epoch, keys) * np.uint64(block_size)
        return begins.astype(np.int64)

    def _gather(self, begins: NDArray[np.int64], length: int) -> torch.Tensor:
        """Windows of ``length`` characters from ``begins``: int64, shape (len(begins), length), on the device."""
        import torch

        if self._file:
            return self._sent(self._read(begins, length))
        starts = torch.from_numpy(begins)
        if self.tokens.is_cuda:
            starts = starts.pin_memory().to(self.tokens.device, non_blocking=True)
        return self.tokens.unfold(0, length, 1)[starts].long()

    def _read(self, begins: NDArray[np.int64], length: int) -> torch.Tensor:
        """The same from the file, as it stands there, on the CPU."""
        import torch

        if not self._file:
            raise ValueError("the split has no file")
        windows = torch.empty(len(begins), length, dtype=self.tokens.dtype, pin_memory=self.device.type == "cuda")
        size = self.tokens.element_size()
        for row, begin in zip(windows.numpy(), begins.tolist(), strict=True):
            if os.preadv(self._file.fileno(), [row], self._header + begin * size) != length * size:
                raise UserError(f"{self._file.name}: has become shorter; `dvc repro --force prepare` makes it anew")
        return windows

    def _sent(self, windows: torch.Tensor) -> torch.Tensor:
        return windows.to(self.device, non_blocking=True).long()

    def sweep(
        self, block_size: int, stride: int, max_chars: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Sweep]:
        """Windows that score every target of the split once, each with the most context that the stride allows.

        Windows start every ``stride`` characters; in all but the first, only targets that no earlier window
        scored count. The n - 1 targets of a split of n characters are all covered.

        Args:
            block_size: characters T of a window.
            stride: characters from one window's start to the next, at most T.
            max_chars: score about this many targets, in windows spread evenly, where the split has more.
            share: (i, n): every n-th window from the i-th, for n processes.
        """
        targets = len(self) - 1
        count = 1 + max(0, -(-(targets - block_size) // stride))
        chosen: range | NDArray[np.int64] = range(count)
        if max_chars is not None and targets > max_chars:
            wanted = max(1, max_chars // (block_size if stride == block_size else stride))
            chosen = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))
        chosen = chosen[share[0] :: share[1]]
        batch = max(1, SWEEP_CHARS[self.device.type] // block_size)
        first = int(len(chosen) > 0 and chosen[0] == 0)
        full = len(chosen) - int(len(chosen) > first and chosen[-1] * stride + block_size > targets)
        for begin, end in pairwise([0, first, *range(first + batch, full, batch), full, len(chosen)]):
            if begin < end:
                begins = np.asarray(chosen[begin:end], dtype=np.int64) * stride
                windows = self._gather(begins, min(block_size, targets - int(begins[-1])) + 1)
                yield Sweep(windows[:, :-1], windows[:, 1:], 0 if begins[0] == 0 else block_size - stride)


def in_thread(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Call a function in a thread that ends with it."""
    from concurrent.futures import Future

    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


@dataclass(frozen=True)
class Corpus:
    """What the stage prepare wrote.

    Attributes:
        train, val: the splits.
        tokenizer: their vocabulary.
        digest: of both splits and the vocabulary, in hexadecimal; see :func:`digest`.
    """

    train: Split
    val: Split
    tokenizer: Tokenizer
    digest: str


def load(folder: Path, device: torch.device | str = "cpu") -> Corpus:
    """Open the prepared corpus, which takes no longer for a large one.

    A split of more than IN_MEMORY bytes is read from its file, batch by batch; so is, for a GPU, one of more than a
    quarter of the GPU's free memory. Others are memory-mapped for a CPU, and copied to another device. Whether a file
    is whole is seen from its size, and of up to IN_MEMORY bytes in all from the digest, too.

    Raises:
        UserError: a file is missing or damaged.
    """
    import torch

    device = torch.device(device)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    again, splits = "`dvc repro --force prepare` makes it anew", []
    name = "digest.json"
    try:
        described = json.loads((folder / name).read_text(encoding="utf-8"))
        recorded, sizes = described["sha256"], {name: int(described["bytes"][name]) for name in SPLITS}
        for name, size in sizes.items():
            tokens = np.load(folder / name, mmap_mode="c")
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{found} bytes, of which {size} were written")
            most = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else IN_MEMORY
            on_disk = torch.from_numpy(tokens)
            splits.append(Split(on_disk, folder / name, device) if tokens.nbytes > most else Split(on_disk.to(device)))
        name = "digest.json"
        if sum(sizes.values()) <= IN_MEMORY and digest(folder, tokenizer, sizes) != recorded:
            raise ValueError("it is not the digest of what lies beside it")
    except FileNotFoundError:
        raise UserError(f"{folder / name}: no such file; `dvc repro prepare` makes it") from None
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise UserError(f"{folder / name}: damaged: {error}; {again}") from None
    return Corpus(splits[0], splits[1], tokenizer, recorded)


def check_context(corpus: Corpus, block_size: int) -> None:
    """Raise a UserError where the training split has no full window of ``block_size`` characters and a target."""
    if len(corpus.train) <= block_size:
        raise UserError(
            f"the training split has {len(corpus.train)} characters, "
            f"too few for model.block_size = {block_size}: use a longer text or a shorter context"
        )
