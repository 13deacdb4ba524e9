"""Tokens: a text encoded to disk in two streaming passes, and read back in batches or as an exact sweep."""

from __future__ import annotations

import codecs
import hashlib
import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from minigpt.errors import UserError
from minigpt.tokenizer import CODE_POINTS, Tokenizer, code_points

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20
"""Bytes read at a time while encoding."""

SWEEP_CHARS = {"cpu": 1 << 13, "cuda": 1 << 18}
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


def read_text(source: Path) -> Iterator[str]:
    """The text of ``source`` in chunks: without byte order marks, every line end as one newline, files apart.

    Raises:
        UserError: a file is not text in UTF-8; the offending byte's offset is named.
    """
    last = "\n"
    for path in text_files(source):
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        position, first, returns = 0, True, False
        with path.open("rb") as file:
            while True:
                data = file.read(CHUNK)
                position += len(data)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    offset = position - len(error.object) + error.start
                    raise UserError(
                        f"{path}: not UTF-8 at byte {offset} (0x{error.object[error.start]:02x}, {error.reason}); "
                        f"save it as UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"
                    ) from None
                if b"\0" in data:
                    offset = position - len(data) + data.index(b"\0")
                    raise UserError(f"{path}: a binary file, not text: NUL at byte {offset}")
                if returns := returns or b"\r" in data:  # up to the first, there is nothing to translate
                    text = newlines.decode(text, final=not data)
                if text:
                    if first and last != "\n":
                        yield "\n"
                    first, last = False, text[-1]
                    yield text
                if not data:
                    break


def normalized(texts: Iterator[str]) -> Iterator[str]:
    """Chunks of a text in the form NFC. They are cut before a newline or space, with which nothing is composed."""
    held = ""
    for text in texts:
        held += text
        cut = max(held.rfind("\n"), held.rfind(" "))
        if cut > 0:
            yield unicodedata.normalize("NFC", held[:cut])
            held = held[cut:]
    yield unicodedata.normalize("NFC", held)


def encode(source: Path, val_fraction: float, folder: Path, normalize: str = "none") -> tuple[Tokenizer, int, int]:
    """Encode a text to ``folder``: train.npy, val.npy and tokenizer.json; memory does not grow with the text.

    The first pass collects the characters, the second writes their ids. Validation is the text's end. The text is
    put in the normal form ``normalize``, NFC or none.

    Returns:
        the tokenizer, and the number of characters of train and val.

    Raises:
        UserError: the text is missing, empty, not UTF-8, or too short to be split.
    """

    def texts() -> Iterator[str]:
        return normalized(read_text(source)) if normalize == "NFC" else read_text(source)

    seen = np.zeros(CODE_POINTS, dtype=np.bool_)
    total = 0
    for text in texts():
        points = code_points(text)
        if not seen.take(points, mode="clip").all():  # reading is three times as fast as marking
            seen[points] = True
        total += len(text)
    if not total:
        raise UserError(f"{source}: empty; there is nothing to learn from")
    n_train = int(total * (1 - val_fraction))
    if n_train < 2 or total - n_train < 2:
        raise UserError(f"{source}: {total} characters are too few to split (data.val_fraction = {val_fraction})")
    tokenizer = Tokenizer.of(seen, normalize)
    tokenizer.save(folder / "tokenizer.json")
    written = 0
    with (folder / "train.npy").open("wb") as train, (folder / "val.npy").open("wb") as val:
        _write_header(train, n_train, tokenizer.dtype)
        _write_header(val, total - n_train, tokenizer.dtype)
        for text in texts():
            ids = tokenizer.encode_known(code_points(text))
            cut = max(0, n_train - written)
            train.write(ids[:cut].data)
            val.write(ids[cut:].data)
            written += len(ids)
    if written != total:
        raise UserError(f"{source}: changed while it was read; run again")
    return tokenizer, n_train, total - n_train


def _write_header(file: BinaryIO, length: int, dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


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
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, first: int, batch_size: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows ``first`` to ``first + batch_size - 1`` of an endless stream that the arguments alone decide.

        The stream runs through the split in epochs. In each, the split is cut into windows that do not overlap, from
        an offset of its own, and they come in an order of their own: all are read equally often, which leaves less
        to learn twice, and more once, than windows at random places.

        Args:
            seed: of the training.
            first: windows that the training has read before.
            batch_size: windows B.
            block_size: characters T of a window.

        Returns:
            ids and targets of type int64, both of shape (B, T), on the device of the tokens.
        """
        import torch

        per_epoch = max(1, (len(self) - block_size) // block_size)
        epochs, places = np.divmod(np.arange(first, first + batch_size, dtype=np.uint64), np.uint64(per_epoch))
        keys = mix(mix(epochs) ^ np.uint64(seed))
        offsets = mix(keys) % np.uint64(len(self) - per_epoch * block_size)
        begins = offsets + shuffled(places, per_epoch, keys) * np.uint64(block_size)
        starts = torch.from_numpy(begins.astype(np.int64))
        if self.tokens.is_cuda:
            starts = starts.pin_memory().to(self.tokens.device, non_blocking=True)
        windows = self.tokens.unfold(0, block_size + 1, 1)[starts].long()
        return windows[:, :-1], windows[:, 1:]

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
        chosen = np.arange(count)
        if max_chars is not None and targets > max_chars:
            wanted = max(1, max_chars // (block_size if stride == block_size else stride))
            chosen = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))
        chosen = chosen[share[0] :: share[1]]
        batch = max(1, SWEEP_CHARS[self.tokens.device.type] // block_size)
        full = chosen[(chosen > 0) & (chosen * stride + block_size <= targets)]
        groups = [chosen[chosen == 0], *np.split(full, range(batch, len(full), batch))]
        groups.append(chosen[(chosen > 0) & (chosen * stride + block_size > targets)])
        for group in groups:
            if len(group):
                length = min(block_size, targets - int(group[-1]) * stride)
                yield self._windows(group * stride, length, 0 if group[0] == 0 else block_size - stride)

    def _windows(self, starts: np.ndarray[Any, Any], length: int, skip: int) -> Sweep:
        import torch

        windows = self.tokens.unfold(0, length + 1, 1)[torch.from_numpy(starts).to(self.tokens.device)].long()
        return Sweep(windows[:, :-1], windows[:, 1:], skip)


@dataclass(frozen=True)
class Corpus:
    """What the stage prepare wrote.

    Attributes:
        train, val: the splits.
        tokenizer: their vocabulary.
        digest: SHA-256 over both splits and the vocabulary, in hexadecimal.
    """

    train: Split
    val: Split
    tokenizer: Tokenizer
    digest: str


def load(folder: Path, device: torch.device | str = "cpu") -> Corpus:
    """Open the prepared corpus: memory-mapped for a CPU; copied to another device.

    Raises:
        UserError: a file is missing or damaged.
    """
    import torch

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    digest = hashlib.sha256(tokenizer.characters.encode("utf-32-le", "surrogatepass"))
    splits = []
    for name in ("train.npy", "val.npy"):
        try:
            tokens = np.load(folder / name, mmap_mode="c")
        except FileNotFoundError:
            raise UserError(f"{folder / name}: no such file; `dvc repro prepare` makes it") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{folder / name}: damaged: {error}; `dvc repro --force prepare` makes it anew") from None
        digest.update(tokens)
        splits.append(Split(torch.from_numpy(tokens).to(device)))
    return Corpus(splits[0], splits[1], tokenizer, digest.hexdigest())


def check_context(corpus: Corpus, block_size: int) -> None:
    """Raise a UserError where the training split has no full window of ``block_size`` characters and a target."""
    if len(corpus.train) <= block_size:
        raise UserError(
            f"the training split has {len(corpus.train)} characters, "
            f"too few for model.block_size = {block_size}: use a longer text or a shorter context"
        )
