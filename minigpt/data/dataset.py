"""Batches for training and evaluation from an encoded corpus.

1. :func:`load_corpus` opens the files of the prepare stage and checks their sizes and, if they are small, their digest.
2. A split that fits in memory is memory-mapped (CPU) or copied to the GPU. A larger one is read from its file.
3. :meth:`Split.batch` cuts a split into windows that do not overlap, once per epoch, from a random offset, and reads
   them in random order. Both depend only on the seed and the epoch, so a resumed training needs no saved state.
4. If the split is read from its file, a thread prefetches the next batch during the training step.
5. :meth:`Split.eval_batches` yields windows in order. They may overlap, but they score every target exactly once.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minigpt.data.encode import SPLITS, TEST, digest
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.files import NOT_REGULAR, read_json

MAX_IN_MEMORY_BYTES = 1 << 28
"""Largest split in bytes that is expected to stay in the system's page cache once it has been read."""

EVAL_BATCH_CHARS = {"cpu": 1 << 13, "cuda": 1 << 16}
"""Characters per evaluation batch, by device type."""

UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]


def splitmix64(words: UInt64Array) -> UInt64Array:
    """Hash 64-bit words with the output function of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def permute(positions: UInt64Array, n: int, keys: UInt64Array) -> UInt64Array:
    """Apply to each position in [0, n) the permutation of range(n) that its key selects.

    A Feistel network permutes range(4^k), where 4^k is the smallest power of 4 that is at least n. Results outside
    [0, n) are mapped again until they are inside (Black and Rogaway 2002). So no n needs a table in memory.
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = positions.copy()
    outside = np.ones(len(positions), dtype=np.bool_)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & low
        for number in range(6):
            left, right = right, left ^ (splitmix64(right ^ splitmix64(keys[outside] + np.uint64(number))) & low)
        result[outside] = left << half | right
        outside = result >= n
    return result


@dataclass(frozen=True)
class EvalBatch:
    """Batch of evaluation windows: ids and the character after each, int64, shape (B, T).

    The first ``already_scored`` targets of each window were scored by the window before it.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    already_scored: int


class Split:
    """Tokens of one split.

    Args:
        tokens: integer ids, shape (n,), on any device; on a CPU usually a memory map.
        file: the .npy file of the tokens, to read windows from it instead of the memory map. Then a file that
            disappears raises an error, where a map would kill the process, and its pages do not count as its memory.
        device: the device of the batches. Default: that of ``tokens``.
    """

    def __init__(self, tokens: torch.Tensor, file: Path | None = None, device: torch.device | None = None) -> None:
        self.tokens = tokens
        self.device = device or tokens.device
        # Windows has no preadv. It does not let a mapped file disappear either.
        self._file = file.open("rb", buffering=0) if file and hasattr(os, "preadv") else None
        self._header = file.stat().st_size - tokens.nbytes if file else 0
        self._reader = ThreadPoolExecutor(1)  # its thread starts with the first prefetch and ends with the split
        self._prefetched: tuple[tuple[int, ...], Future[torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(
        self, seed: int, first: int, batch_size: int, block_size: int, prefetch_stride: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and targets, int64, (batch_size, block_size), from an endless stream of training windows.

        The batch has the windows from number ``first`` of the stream. The stream depends only on the split, ``seed``
        and ``block_size``. An epoch reads each of its windows once, in random order. Windows at independent random
        positions would repeat some characters and miss others.

        If the split has a file and ``prefetch_stride`` is not 0, the next batch is expected at
        ``first + prefetch_stride`` and read concurrently. This never changes a batch.

        Raises:
            UserError: the file became shorter.
            OSError: the file cannot be read.
        """
        request = (seed, first, batch_size, block_size)
        prefetched, future = self._prefetched or ((), None)
        windows = future.result() if future and prefetched == request else self._training_windows(*request)
        self._prefetched = None
        if self._file and prefetch_stride:
            following = (seed, first + prefetch_stride, batch_size, block_size)
            self._prefetched = following, self._reader.submit(self._training_windows, *following)
        return self._ids_and_targets(windows)

    def _training_windows(self, seed: int, first: int, batch_size: int, block_size: int) -> torch.Tensor:
        """Return windows of the training stream, each of block_size + 1 tokens."""
        per_epoch = max(1, (len(self) - block_size) // block_size)
        epochs, indices = np.divmod(np.arange(first, first + batch_size, dtype=np.uint64), np.uint64(per_epoch))
        keys = splitmix64(splitmix64(epochs) ^ np.uint64(seed))
        offsets = splitmix64(keys) % np.uint64(len(self) - per_epoch * block_size)
        starts = offsets + permute(indices, per_epoch, keys) * np.uint64(block_size)
        return self._windows(starts.astype(np.int64), block_size + 1)

    def _windows(self, starts: NDArray[np.int64], length: int) -> torch.Tensor:
        """Return windows, shape (len(starts), length), in the tokens' dtype; on the CPU if read from the file."""
        if not self._file:
            indices = torch.from_numpy(starts)
            if self.tokens.is_cuda:
                indices = indices.pin_memory().to(self.tokens.device, non_blocking=True)
            return self.tokens.unfold(0, length, 1)[indices]
        windows = torch.empty(len(starts), length, dtype=self.tokens.dtype, pin_memory=self.device.type == "cuda")
        size = self.tokens.element_size()
        for row, start in zip(windows.numpy(), starts.tolist(), strict=True):
            if os.preadv(self._file.fileno(), [row], self._header + start * size) != length * size:
                raise UserError(f"{self._file.name}: became shorter; create it again with `dvc repro --force prepare`")
        return windows

    def _ids_and_targets(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        windows = windows.to(self.device, non_blocking=True).long()
        return windows[:, :-1], windows[:, 1:]

    def eval_batches(
        self, block_size: int, stride: int, max_chars: int | None = None, shard: tuple[int, int] = (0, 1),
        start: int = 0,
    ) -> Iterator[EvalBatch]:  # fmt: skip
        """Yield windows of ``block_size`` ids that score each of the n - 1 targets of a split of n characters once.

        A window starts every ``stride`` <= block_size characters. Only the targets that no earlier window covers are
        scored, so each has the longest context that the stride allows. With ``max_chars``, about that many targets are
        scored, in evenly spaced windows. For n processes, shard (i, n) yields every n-th window from window i. The
        first ``start`` characters are left out.
        """
        targets = len(self) - 1 - start
        count = 1 + max(0, -(-(targets - block_size) // stride))
        chosen: range | NDArray[np.int64] = range(count)
        if max_chars is not None and targets > max_chars:
            wanted = max(1, max_chars // (block_size if stride == block_size else stride))
            chosen = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))
        chosen = chosen[shard[0] :: shard[1]]
        size = max(1, EVAL_BATCH_CHARS[self.device.type] // block_size)
        # The first window scores all its targets, and the last one may be shorter: each is a batch of its own.
        first = int(len(chosen) > 0 and chosen[0] == 0)
        full = len(chosen) - int(len(chosen) > first and chosen[-1] * stride + block_size > targets)
        for begin, end in pairwise([0, first, *range(first + size, full, size), full, len(chosen)]):
            if begin < end:
                offsets = np.asarray(chosen[begin:end], dtype=np.int64) * stride
                windows = self._windows(start + offsets, min(block_size, targets - int(offsets[-1])) + 1)
                yield EvalBatch(*self._ids_and_targets(windows), 0 if offsets[0] == 0 else block_size - stride)


@dataclass(frozen=True)
class Corpus:
    """Corpus written by the prepare stage; ``digest`` is the hash of all splits and the vocabulary.

    ``n_test`` is the number of characters of the test split, even if the split was not requested.
    """

    train: Split
    val: Split
    tokenizer: Tokenizer
    digest: str
    test: Split | None = None
    n_test: int = 0


def load_corpus(folder: Path, device: torch.device | str = "cpu", *, with_test: bool = False) -> Corpus:
    """Open a corpus written by :func:`minigpt.data.encode.encode_corpus`. A large one opens as fast as a small one.

    The test split is opened only ``with_test``, so that no training can depend on it by mistake.

    A split is read from its file if it is larger than MAX_IN_MEMORY_BYTES (CPU) or a quarter of the free memory (GPU).
    The size of each file is checked, and the digest if the files have at most MAX_IN_MEMORY_BYTES together.

    Raises:
        UserError: a file is missing or damaged.
    """
    device = torch.device(device)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    path, splits, n_test = folder / "digest.json", [], 0
    try:
        content = read_json(path)
        recorded, written = content["sha256"], content["bytes"]
        names = (*SPLITS, TEST) if TEST in written else SPLITS
        sizes = {name: int(written[name]) for name in names}
        for name, size in sizes.items():
            path = folder / name
            if path.exists() and not path.is_file():
                raise ValueError(NOT_REGULAR)
            tokens = torch.from_numpy(np.lib.format.open_memmap(path, "c"))  # copy-on-write: torch warns if read-only
            if tokens.shape != (len(tokens),) or tokens.numpy().dtype != tokenizer.dtype:
                raise ValueError("not tokens of the vocabulary in this folder")
            if (found := path.stat().st_size) != size:
                raise ValueError(f"{found} bytes, but {size} were written")
            if name == TEST:
                n_test = len(tokens)
                if not with_test:
                    continue
            limit = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else MAX_IN_MEMORY_BYTES
            splits.append(Split(tokens, path, device) if tokens.nbytes > limit else Split(tokens.to(device)))
        path = folder / "digest.json"
        if sum(sizes.values()) <= MAX_IN_MEMORY_BYTES and digest(folder, tokenizer, sizes) != recorded:
            raise ValueError("not the digest of the files in this folder")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; create it with `dvc repro prepare`") from None
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged: {error}; create it again with `dvc repro --force prepare`") from None
    return Corpus(splits[0], splits[1], tokenizer, recorded, splits[2] if len(splits) > 2 else None, n_test)
