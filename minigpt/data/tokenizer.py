"""Character-level tokenizer: the vocabulary is the sorted set of the code points of a text."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.data.unicode import code_points, nfc
from minigpt.errors import UserError
from minigpt.files import require_json, write_json

CODE_POINTS = 0x110000
"""Number of code points in Unicode."""


class Tokenizer:
    """Tokenizer with one id per character.

    Args:
        characters: the vocabulary, not empty. The id of a character is its index.
        normalize: ``NFC`` to normalize texts before they are encoded, or ``none``.
    """

    def __init__(self, characters: str, normalize: str = "none") -> None:
        self.characters = characters
        self.normalize = normalize
        self.vocab_size = size = len(characters)
        # The smallest type that holds every id. torch has all three.
        self.dtype = np.dtype(np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32)
        self._code_points = code_points(characters).astype("<u4")
        self._ids = np.zeros(int(self._code_points.max()) + 1, self.dtype)
        self._ids[self._code_points] = np.arange(self.vocab_size)

    @classmethod
    def from_seen(cls, seen: NDArray[np.bool_], normalize: str = "none") -> Tokenizer:
        """Create the tokenizer whose vocabulary is the code points marked in ``seen``, shape (CODE_POINTS,)."""
        points = np.flatnonzero(seen).astype("<u4")
        return cls(points.tobytes().decode("utf-32-le", "surrogatepass"), normalize)

    def encode_known(self, points: NDArray[Any]) -> NDArray[Any]:
        """Return the ids, in ``dtype``, of code points that must all be in the vocabulary. This is not checked."""
        if points.dtype == np.uint8 == self.dtype:  # twice as fast as take
            return np.frombuffer(bytearray(points).translate(self._ids[:256].tobytes().ljust(256)), dtype=np.uint8)
        return self._ids.take(points, mode="clip")

    def normalized(self, text: str) -> str:
        """Return ``text`` in the tokenizer's normal form."""
        return nfc(text) if self.normalize == "NFC" else text

    def without_unknown(self, text: str) -> tuple[str, str]:
        """Return ``text``, normalized, without characters outside the vocabulary; and those characters, sorted."""
        text, known = self.normalized(text), set(self.characters)
        return "".join(c for c in text if c in known), "".join(sorted(set(text) - known))

    def usable_prompt(self, prompt: str) -> str:
        """Return the prompt without unknown characters, or the first of the vocabulary if none is left."""
        return self.without_unknown(prompt)[0] or self.characters[0]

    def encode(self, text: str, name: str = "the text") -> NDArray[Any]:
        """Return the ids of ``text`` after normalization, shape (characters,).

        Raises:
            UserError: a character is not in the vocabulary. The message starts with ``name``.
        """
        text = self.normalized(text)
        points = code_points(text)
        unknown = np.flatnonzero(~np.isin(points, self._code_points))
        if unknown.size:
            character = f"character {unknown[0] + 1}, {describe_character(text[unknown[0]])}"
            raise UserError(f"{name}: {character}, does not occur in the training text")
        return self.encode_known(points)

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """Return the text of ``ids``, each in [0, vocab_size)."""
        array = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype=np.int64)
        return self._code_points[array].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"kind": "characters", "normalize": self.normalize, "characters": self.characters})

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a vocabulary written by :meth:`save`. Raise a UserError if the file is missing or not a vocabulary."""
        content = require_json(path, "a vocabulary")
        try:
            characters, normalize = content["characters"], content["normalize"]
            if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
                raise ValueError("characters must be a non-empty string without repeated characters")
            characters.encode()  # raises a ValueError for surrogates, which cannot be written
            if normalize not in ("none", "NFC"):
                raise ValueError(f"normalize must be none or NFC, got {reprlib.repr(normalize)}")
            return cls(characters, normalize)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a vocabulary: {error}") from None


def describe_character(character: str) -> str:
    """Return a character with its code point and Unicode name, for messages."""
    name = unicodedata.name(character, "")
    return f"{character!r} (U+{ord(character):04X}{' ' + name if name else ''})"
