"""TODO."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from numpy.typing import NDArray

from minigpt.data.tokenizer import code_points
from minigpt.errors import UserError

if TYPE_CHECKING:
    pass

CHUNK = 1 << 16
"""Bytes decoded at a time: few enough to stay in a core's cache, and often all ASCII."""

PIECE = 1 << 25
"""Bytes of a text, of one file or of several, that one process reads at a time."""


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
    """A part of a text file that can be read on its own, from one last_safe_cut to another.

    Attributes:
        path: the file.
        begin, end: its bytes, at least one character.
        joined: whether a newline is put before, since the file's first byte follows a file that does not end in one.
    """

    path: str
    begin: int
    end: int
    joined: bool = False


def last_safe_cut(data: bytes, normalize: str) -> int:
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
                    place = last_safe_cut(_bytes(file, start, end), normalize)
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
                cut = len(held) if place + len(held) == span.end else last_safe_cut(held, normalize)
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
