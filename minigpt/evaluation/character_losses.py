"""File with -ln p of each validation character, by which models are compared over the same text.

Short texts have one number for each character. Longer ones have the sum of each segment of equally many characters. A
segment starts at the same character for every model, so models with different context lengths can be compared.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt.data.dataset import EvalBatch

FILE = "losses.npz"
MAX_SEGMENTS = 1 << 18
"""Most numbers in a file; they take 1 MB."""


@dataclass(frozen=True)
class CharacterLosses:
    """Sums of -ln p over consecutive segments of a text.

    Args:
        nats: one sum per segment, float32. A segment has ``segment`` characters, and the last one may be shorter.
        segment: characters of a segment, a power of two.
        characters: all scored characters.
        text: SHA-256 of the text, which does not depend on the vocabulary.
    """

    nats: NDArray[np.float32]
    segment: int
    characters: int
    text: str

    def save(self, folder: Path) -> None:
        """Write the file. Equal losses give equal bytes."""
        np.savez(folder / FILE, nats=self.nats, segment=self.segment, characters=self.characters, text=self.text)

    @classmethod
    def load(cls, file: IO[bytes], name: str) -> CharacterLosses:
        """Read an open file. The UserError for a damaged one starts with ``name``."""
        try:
            if not zipfile.is_zipfile(file):  # else NumPy advises to unpickle it
                raise ValueError("not an archive of arrays")
            with np.load(file, allow_pickle=False) as content:
                nats = content["nats"]
                losses = cls(nats, int(content["segment"]), int(content["characters"]), str(content["text"]))
            if nats.dtype != np.float32 or nats.shape != (-(-losses.characters // losses.segment),):
                raise ValueError(f"{nats.shape} sums of {losses.segment} characters for {losses.characters}")
        except (ValueError, KeyError, TypeError, OSError, EOFError, ZeroDivisionError, zipfile.BadZipFile) as error:
            raise UserError(f"{name}: damaged: {error}; `dvc checkout --force dvc.yaml` restores it") from None
        return losses

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each segment."""
        lengths = np.full(len(self.nats), self.segment)
        lengths[-1:] = self.characters - self.segment * (len(self.nats) - 1)
        return lengths


class LossRecorder:
    """Recorder of the losses of a text in reading order. Pass :meth:`add` to ``score`` as the callback."""

    def __init__(self, characters: int) -> None:
        self.segment = 1
        while -(-characters // self.segment) > MAX_SEGMENTS:
            self.segment *= 2
        self.characters = 0
        self._sums: list[NDArray[np.float64]] = []
        self._rest = np.zeros(0)  # characters of a segment that is not complete

    def add(self, batch: EvalBatch, _logits: Tensor, nats: Tensor) -> None:
        """Add -ln p (B, T) of the targets that no earlier batch has scored."""
        self.extend(scored_nats(batch, nats))

    def extend(self, nats: NDArray[np.float64]) -> None:
        """Add -ln p of the next characters."""
        self.characters += len(nats)
        nats = np.concatenate([self._rest, nats])
        complete = len(nats) // self.segment * self.segment
        self._sums.append(nats[:complete].reshape(-1, self.segment).sum(1))
        self._rest = nats[complete:]

    def result(self, text: str) -> CharacterLosses:
        """Return the losses of all characters that were added; ``text`` is the digest of the text."""
        last = [self._rest.sum(keepdims=True)] if len(self._rest) else []
        sums = np.concatenate([*self._sums, *last]).astype(np.float32)
        return CharacterLosses(sums, self.segment, self.characters, text)


def scored_nats(batch: EvalBatch, nats: Tensor) -> NDArray[np.float64]:
    """Return those of -ln p (B, T) that no earlier batch has scored, in reading order."""
    return nats[:, batch.already_scored :].flatten().double().numpy(force=True)


def text_digest(tokens: NDArray[Any], tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a text in UTF-32: the same for every vocabulary."""
    result, size = hashlib.sha256(), 1 << 20
    for begin in range(0, len(tokens), size):
        result.update(tokenizer.decode(tokens[begin : begin + size]).encode("utf-32-le", "surrogatepass"))
    return result.hexdigest()
