"""Text from the command line and standard input, and text on the terminal."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator

import regex

from minigpt.errors import UserError

LONGEST_PROMPT = 64 << 20  # bytes that are read from standard input, which may have no end


def from_argument(text: str, name: str) -> str:
    """Return an argument of the program, which is UTF-8 even if Python has read it in an ASCII locale."""
    return decode(os.fsencode(text), name)


def read_prompt() -> str:
    """Return the text on standard input, as UTF-8 in any locale; in a terminal, an empty one."""
    if sys.stdin.isatty():
        return ""
    try:
        data = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    except OSError as error:
        raise UserError(f"standard input: not readable: {error.strerror or error}") from None
    if len(data) > LONGEST_PROMPT:
        raise UserError(f"standard input: longer than {LONGEST_PROMPT >> 20} MB, the limit for a prompt")
    return decode(data, "standard input").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, name: str) -> str:
    """Return UTF-8 as text, or raise a UserError that starts with ``name``."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start + 1} is 0x{data[error.start]:02x}"
        advice = "convert the text, for example with `iconv -f LATIN1 -t UTF-8`"
        raise UserError(f"{name}: not UTF-8: {wrong}; {advice}") from None


def graphemes(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the text of ``pieces`` in whole graphemes: characters as a reader sees them (Unicode's annex 29)."""
    incomplete = ""
    for piece in pieces:
        *complete, incomplete = regex.findall(r"\X", incomplete + piece) or [""]
        if complete:
            yield "".join(complete)
    yield incomplete


def show(texts: Iterable[str]) -> None:
    """Print texts as they arrive; Ctrl-C and a closed pipe end the program without a message."""
    last = "\n"
    try:
        for text in texts:
            print(text, end="", flush=True)
            last = text[-1:] or last
    except KeyboardInterrupt:
        print()
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter flushes to it at exit
        sys.exit(128 + signal.SIGPIPE)
    if last != "\n":
        print()
