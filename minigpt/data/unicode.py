"""Code points of a text, and Unicode's normal form C (NFC) in linear time.

``unicodedata.normalize`` sorts the combining marks after a character by insertion. For a long run of them in the wrong
order, the time is the square of the length. So a long run is sorted before.
"""

import functools
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONG_RUN = 256
"""Characters without a boundary between them, for which insertion is still fast."""


def code_points(text: str) -> NDArray[Any]:
    """Return the code points of ``text``, shape (len(text),): uint8 if all are ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    # A plain copy of the string's memory. CPython's encoders inspect each character.
    return np.array([text]).view(np.uint32)


def nfc(text: str) -> str:
    """Return ``text`` in NFC."""
    if len(text) > LONG_RUN and not text.isascii():
        boundaries = np.flatnonzero(_tables()[0][code_points(text)])
        if np.diff(boundaries, prepend=0, append=len(text)).max() > LONG_RUN:
            text = _sort_marks(text)
    return unicodedata.normalize("NFC", text)


def nfc_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the text of ``chunks`` in NFC, in chunks that end at a boundary of normalization."""
    pending: list[str] = []
    for chunk in chunks:
        if cut := last_boundary(chunk):
            yield nfc("".join([*pending, chunk[:cut]]))
            pending = []
        pending.append(chunk[cut:])
    yield nfc("".join(pending))


def last_boundary(text: str) -> int:
    """Return the last index inside ``text`` before which it can be cut, so that its parts can be normalized; or 0."""
    if text.isascii():  # without the tables, which take 0.3 s
        return max(0, len(text) - 1)
    boundaries = np.flatnonzero(_tables()[0][code_points(text[1:])])
    return int(boundaries[-1]) + 1 if len(boundaries) else 0


@functools.cache
def _tables() -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Return for each code point whether it is independent of every character before it, and its combining class.

    It is independent unless its decomposition starts with a combining mark, or with a character that composes with an
    earlier one. Surrogates stand for invalid bytes of a file, where a text is not cut.
    """
    independent = np.ones(sys.maxunicode + 1, dtype=np.bool_)
    independent[0xD800:0xE000] = False
    independent[[*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]] = False  # vowels and final consonants of Hangul
    characters = map(chr, range(sys.maxunicode + 1))
    classes = np.fromiter(map(unicodedata.combining, characters), np.uint8, sys.maxunicode + 1)
    independent[classes > 0] = False
    found = ((point, unicodedata.decomposition(chr(point))) for point in range(sys.maxunicode + 1))
    decomposed = {point: parts.split() for point, parts in found if parts and parts[0] != "<"}
    for parts in decomposed.values():
        independent[[int(part, 16) for part in parts[1:]]] = False
    for point in decomposed:
        independent[point] &= independent[ord(unicodedata.normalize("NFD", chr(point))[0])]
    return independent, classes


def _sort_marks(text: str) -> str:
    """Return a canonically equivalent text in which each run of combining marks is in the order of NFC."""
    for mark, parts in _decomposed_marks().items():  # their parts could be out of order again
        text = text.replace(mark, parts)
    points, (_, table) = code_points(text), _tables()
    classes = table[points]
    if not ((classes[1:] < classes[:-1]) & (classes[1:] > 0)).any():
        return text
    order = np.argsort(classes, kind="stable")
    order = order[np.argsort(np.cumsum(classes == 0)[order], kind="stable")]  # keeps the order within each run
    return points[order].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def _decomposed_marks() -> dict[str, str]:
    """Return the combining marks that stand for several marks or for another one, with those."""
    marks = [chr(point) for point in np.flatnonzero(~_tables()[0]).tolist()]
    decomposed = {mark: unicodedata.normalize("NFD", mark) for mark in marks}
    return {mark: parts for mark, parts in decomposed.items() if mark != parts and unicodedata.combining(parts[0])}
