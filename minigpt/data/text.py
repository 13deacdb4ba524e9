"""Text files as arrays of code points, read in bounded memory.

A text is cut twice. A *piece* is about 32 MB, from one file or several, and is read by one process. A *chunk* is up to
64 KB of a piece and is decoded in one call. Both end at a safe cut, so that decoding and normalizing each of them alone
gives the same characters as decoding and normalizing the whole text.
"""

import codecs
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from minigpt.data.unicode import code_points, last_boundary, nfc_chunks
from minigpt.errors import UserError

CHUNK_BYTES = 1 << 16
"""Bytes that are decoded in one call. They fit into a core's cache, and many chunks are entirely ASCII."""

BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
"""First bytes of a text in another encoding, and the name of the encoding."""

PIECE_BYTES = 1 << 25
"""Bytes that one process reads in one task."""


@dataclass(frozen=True)
class Span:
    """The bytes [begin, end) of a text file, not empty, between two safe cuts.

    If ``joined``, a newline is inserted before it: it starts a file, and the previous file does not end in a newline.
    """

    path: str
    begin: int
    end: int
    joined: bool = False

    def __len__(self) -> int:
        return self.end - self.begin


def find_text_files(source: Path) -> list[Path]:
    """Return the file ``source``, or the .txt files in the folder ``source`` and its subfolders, sorted by path."""
    try:
        files = [source] if not source.is_dir() else sorted(path for path in source.rglob("*.txt") if not path.is_dir())
        for path in files:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):  # opening a named pipe waits for a writer
                kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
                raise UserError(f"{path}: {kind}, not a file; remove it (data.source in params.yaml)")
            with path.open("rb"):
                pass
    except FileNotFoundError as error:
        problem = "no such file or folder" if error.filename == str(source) else "the link points to no file"
        raise UserError(f"{error.filename}: {problem} (data.source in params.yaml)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(source)[:200]!r}: not readable: {reason} (data.source in params.yaml)") from None
    if not files:
        raise UserError(f"{source}: no .txt file in this folder (data.source in params.yaml)")
    return files


def last_safe_cut(data: bytes) -> int:
    """Return the last position inside ``data``, a part of a UTF-8 text, where the text can be cut; 0 if none.

    A safe cut is never inside a character or a CRLF line end.
    """
    for cut in range(len(data) - 1, 0, -1):
        if data[cut] & 0xC0 != 0x80 and data[cut - 1 : cut + 1] != b"\r\n":
            return cut
    return 0


def split_into_pieces(paths: list[Path], normalize: str) -> Iterator[list[Span]]:
    """Yield pieces of about PIECE_BYTES that together are the text of the files, in order. Empty files are skipped."""
    piece: list[Span] = []
    remaining, newline = PIECE_BYTES, True
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= len(codecs.BOM_UTF8) and _read_range(file, 0, size) in (b"", codecs.BOM_UTF8):
                continue
            begin = 0
            while begin < size:
                end = _find_cut(file, begin, begin + remaining, size, normalize)
                piece.append(Span(str(path), begin, end, joined=not begin and not newline))
                remaining -= len(piece[-1])
                begin = end
                if remaining <= CHUNK_BYTES:
                    yield piece
                    piece, remaining = [], PIECE_BYTES
            newline = _read_range(file, size - 1, size) in (b"\n", b"\r")
    if piece:
        yield piece


def _find_cut(file: BinaryIO, begin: int, end: int, size: int, normalize: str) -> int:
    """Return a safe cut in the chunk before ``end``, or in a later chunk if that has none, or ``size``.

    With NFC, the character after the cut is also independent of the characters before it.
    """
    while end < size:
        start = max(begin, end - CHUNK_BYTES)
        data = _read_range(file, start, end)
        cut = last_safe_cut(data)
        if normalize == "NFC" and cut:
            text = data[:cut].decode("utf-8", "surrogateescape")
            boundary = last_boundary(text)
            boundary -= text[boundary - 1 : boundary + 1] == "\r\n"
            cut = len(text[:boundary].encode("utf-8", "surrogateescape"))
        if cut:
            return start + cut
        end += PIECE_BYTES
    return size


def _read_range(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def read_piece(piece: list[Span], normalize: str = "none") -> Iterator[NDArray[Any]]:
    """Yield the code points of a piece, chunk by chunk: without byte order marks, with LF line ends, normalized."""
    chunks = _read_chunks(piece)
    return map(code_points, nfc_chunks(chunks) if normalize == "NFC" else chunks)


def _read_chunks(piece: list[Span]) -> Iterator[str]:
    for span in piece:
        if span.joined:
            yield "\n"
        with open(span.path, "rb", buffering=0) as file:
            offset, pending = file.seek(span.begin), b""
            while offset < span.end:
                data = file.read(min(CHUNK_BYTES, span.end - offset - len(pending)))
                if not data:
                    raise changed_error(span.path)
                pending += data
                ends = offset + len(pending) == span.end
                cut = len(pending) if ends else last_safe_cut(pending)
                if not cut:
                    # Reject invalid bytes now: without a safe cut, a binary file would fill the memory first.
                    _decode(span.path, offset, pending, final=False)
                    continue
                data, pending = pending[:cut], pending[cut:]
                text = _decode(span.path, offset, data)
                yield text.replace("\r\n", "\n").replace("\r", "\n") if b"\r" in data else text
                offset += cut


def _decode(path: str, offset: int, data: bytes, final: bool = True) -> str:
    """Decode ``data``, read at ``offset`` of a file. Unless ``final``, its last character may be incomplete."""
    nul = data.find(b"\0")
    try:
        text, _ = codecs.utf_8_decode(data if nul < 0 else data[:nul], "strict", final or nul >= 0)
    except UnicodeDecodeError as error:
        start = data[:4] if offset == 0 else b""
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "LATIN1")
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}, {error.reason}); "
            f"save it as UTF-8, for example with `iconv -f {encoding} -t UTF-8`"
        ) from None
    if nul >= 0:
        hint = "if it is a text in UTF-16 or UTF-32, save it as UTF-8"
        raise UserError(f"{path}: a binary file, not text: NUL at byte {offset + nul}; {hint}")
    return text.removeprefix("\ufeff") if offset == 0 else text


def changed_error(path: str | Path) -> UserError:
    """Return the error for a text that was modified during encoding."""
    return UserError(f"{path}: changed while it was read; run the command again")
