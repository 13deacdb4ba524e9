"""Characters to ids and back: the vocabulary is the set of code points of a text, in their order."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import UserError
from minigpt.files import write_json

CODE_POINTS = 0x110000
"""How many code points Unicode has."""


def code_points(text: str) -> NDArray[Any]:
    """The characters of ``text`` as numbers, shape (len(text),): bytes where all are ASCII, else of 32 bits."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.array([text]).view(np.uint32)  # a copy; CPython's encoders look at each character


class Tokenizer:
    """One id per character.

    Args:
        characters: the vocabulary, not empty; the id of a character is its position.
        normalize: ``NFC`` where texts are put in that form before they are encoded, else ``none``.
    """

    def __init__(self, characters: str, normalize: str = "none") -> None:
        self.characters = characters
        self.normalize = normalize
        self._points = code_points(characters).astype("<u4")
        self._ids = np.zeros(int(self._points.max()) + 1, self.dtype)
        self._ids[self._points] = np.arange(self.vocab_size)

    @classmethod
    def of(cls, seen: NDArray[np.bool_], normalize: str = "none") -> Tokenizer:
        """The tokenizer of the code points marked in ``seen``, shape (CODE_POINTS,)."""
        points = np.flatnonzero(seen).astype("<u4")
        return cls(points.tobytes().decode("utf-32-le", "surrogatepass"), normalize)

    @property
    def vocab_size(self) -> int:
        """How many characters have an id."""
        return len(self.characters)

    @property
    def dtype(self) -> Any:
        """The smallest of torch's index types that holds every id."""
        sizes = {1 << 8: np.uint8, 1 << 15: np.int16}
        return np.dtype(next((kind for size, kind in sizes.items() if self.vocab_size <= size), np.int32))

    def encode_known(self, points: NDArray[Any]) -> NDArray[Any]:
        """Ids of code points that are all in the vocabulary, in the dtype of the tokens on disk; nothing is checked."""
        if points.dtype == np.uint8 == self.dtype:  # twice as fast as take
            return np.frombuffer(bytearray(points).translate(self._ids[:256].tobytes().ljust(256)), dtype=np.uint8)
        return self._ids.take(points, mode="clip")

    def normalized(self, text: str) -> str:
        """``text`` in the form in which it is encoded."""
        return unicodedata.normalize("NFC", text) if self.normalize == "NFC" else text

    def without_unknown(self, text: str) -> tuple[str, str]:
        """``text``, normalized, less the characters that have no id; and those, each once."""
        text, known = self.normalized(text), set(self.characters)
        return "".join(c for c in text if c in known), "".join(sorted(set(text) - known))

    def encode(self, text: str, name: str = "the text") -> NDArray[Any]:
        """The ids of ``text``, normalized, shape (characters,).

        Raises:
            UserError: a character of ``text`` has no id; the first is shown. ``name`` says what the text is.
        """
        text = self.normalized(text)
        points = code_points(text)
        unknown = np.flatnonzero(~np.isin(points, self._points))
        if unknown.size:
            position = int(unknown[0])
            raise UserError(
                f"{name}: character {position + 1}, {describe(text[position])}, does not occur in the training text"
            )
        return self.encode_known(points)

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """The text of ``ids``, each in [0, vocab_size)."""
        array = np.fromiter(ids, dtype=np.int64) if not isinstance(ids, np.ndarray) else ids
        return self._points[array].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"kind": "characters", "normalize": self.normalize, "characters": self.characters})

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is missing or not such a vocabulary.
        """
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            characters, normalize = described["characters"], described["normalize"]
            if not isinstance(characters, str) or not characters or len(set(characters)) != len(characters):
                raise ValueError("its characters are no text of distinct characters")
            if normalize not in ("none", "NFC"):
                raise ValueError(f"its normalize is {normalize!r}, not none or NFC")
            return cls(characters, normalize)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a vocabulary: {error}") from None


def describe(character: str) -> str:
    """A character for people: itself, its code point and its name."""
    name = unicodedata.name(character, "")
    return f"{character!r} (U+{ord(character):04X}{' ' + name if name else ''})"
