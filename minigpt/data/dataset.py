"""Tokens: a text encoded to disk in two passes, by all cores, and read back in batches or as an exact sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from minigpt.data.encode import SPLITS, digest
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

Result = TypeVar("Result")

IN_MEMORY = 1 << 28
"""Bytes up to which a split is taken to stay in memory once it was read."""

EVAL_BATCH_CHARS = {"cpu": 1 << 13, "cuda": 1 << 16}
"""Characters of a batch of an exact sweep, by device."""

Words = np.ndarray[Any, np.dtype[np.uint64]]


def splitmix64(words: Words) -> Words:
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
            left, right = right, left ^ (splitmix64(right ^ splitmix64(keys[outside] + np.uint64(number))) & low)
        result[outside] = left << half | right
        outside = result >= n
    return result


@dataclass(frozen=True)
class EvalBatch:
    """Part of an exact sweep: windows of one length, as a batch.

    Attributes:
        ids: what the model reads, shape (B, T).
        targets: the character after each, shape (B, T).
        skip: how many leading targets of each window an earlier window has scored already.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    already_scored: int


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
        self, seed: int, first: int, batch_size: int, block_size: int, prefetch_stride: int = 0
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
            prefetch_stride: how many windows after this batch's first the next begins; 0: not known. From a file
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
        following = (seed, first + prefetch_stride, batch_size, block_size)
        self._ahead = (following, in_thread(self._read_batch, *following)) if prefetch_stride else None
        windows = self._sent(windows)
        return windows[:, :-1], windows[:, 1:]

    def _read_batch(self, seed: int, first: int, batch_size: int, block_size: int) -> torch.Tensor:
        return self._read(self._begins(seed, first, batch_size, block_size), block_size + 1)

    def _begins(self, seed: int, first: int, batch_size: int, block_size: int) -> NDArray[np.int64]:
        per_epoch = max(1, (len(self) - block_size) // block_size)
        epochs, places = np.divmod(np.arange(first, first + batch_size, dtype=np.uint64), np.uint64(per_epoch))
        keys = splitmix64(splitmix64(epochs) ^ np.uint64(seed))
        offsets = splitmix64(keys) % np.uint64(len(self) - per_epoch * block_size)
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

    def eval_batches(
        self, block_size: int, stride: int, max_chars: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Iterator[EvalBatch]:
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
        batch = max(1, EVAL_BATCH_CHARS[self.device.type] // block_size)
        first = int(len(chosen) > 0 and chosen[0] == 0)
        full = len(chosen) - int(len(chosen) > first and chosen[-1] * stride + block_size > targets)
        for begin, end in pairwise([0, first, *range(first + batch, full, batch), full, len(chosen)]):
            if begin < end:
                begins = np.asarray(chosen[begin:end], dtype=np.int64) * stride
                windows = self._gather(begins, min(block_size, targets - int(begins[-1])) + 1)
                yield EvalBatch(windows[:, :-1], windows[:, 1:], 0 if begins[0] == 0 else block_size - stride)


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
