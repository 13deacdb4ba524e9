"""Masking of secrets in messages: by the values in the environment, in every usual encoding, and by their position."""

import base64
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TextIO, cast
from urllib.parse import unquote

# Variables with these words in their names have secrets. Short values are not masked: they occur in other words.
SECRET_WORDS = {"TOKEN", "PASSWORD", "PASSWD", "SECRET", "CREDENTIALS", "KEY"}
SHORTEST, SHORTEST_OF_OTHERS = 4, 8  # characters: of passwords for tracking, and of other programs
POSITIONS = (  # of secrets that are not in the environment
    (
        re.compile(r"(?<=://)[^\s/'\"<>@][^\s'\"<>]*@|(?<=://)@"),
        "",
    ),  # user and password of an address, up to its last @
    (re.compile(r"\b(Basic|Bearer)\s+(?=\S*[0-9A-Z=])[\w+/=.~-]{8,}"), r"\1 ***"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?!basic|bearer)[^\s'\",;]+"), r"\1***"),
    (
        re.compile(r"(?i)((?:passw(?:or)?d|pwd|secret|token|api_?key|access_key)['\"]?\s*[:=]\s*['\"]?)[^\s'\"&,;]+"),
        r"\1***",
    ),
)


def mask(text: str) -> str:
    """Return the text without secrets."""
    for name, pattern in _patterns(tuple(sorted(secrets()))):
        text = pattern.sub(lambda _, name=name: f"${name}", text)  # type: ignore[misc]
    for pattern, replacement in POSITIONS:
        text = pattern.sub(replacement, text)
    return text


def secrets() -> set[tuple[str, str]]:
    """Return the secrets in the environment, as pairs of a variable's name and a value."""
    found = {(name, value) for name, value in os.environ.items() if SECRET_WORDS & set(name.upper().split("_"))}
    if not os.environ.get("MLFLOW_TRACKING_PASSWORD"):  # a token can be the user name, without a password
        found.add(("MLFLOW_TRACKING_USERNAME", os.environ.get("MLFLOW_TRACKING_USERNAME", "")))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if in_uri := re.match(r"[\w+]+://([^/:@]*):(.*)@|[\w+]+://([^/@]+)@", uri):
        password = in_uri[2] or in_uri[3] or ""
        found |= {("MLFLOW_TRACKING_URI", password), ("MLFLOW_TRACKING_URI", unquote(password))}
    tracking = ("DAGSHUB_USER_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI")
    return {pair for pair in found if len(pair[1]) >= (SHORTEST if pair[0] in tracking else SHORTEST_OF_OTHERS)}


@lru_cache(maxsize=16)
def _patterns(found: tuple[tuple[str, str], ...]) -> list[tuple[str, re.Pattern[str]]]:
    """Return a pattern for each secret, those of long ones first, because they may contain others."""
    ordered = sorted(found, key=lambda secret: -len(secret[1]))
    return [(name, re.compile("|".join(_encodings(value)))) for name, value in ordered]


def _encodings(value: str) -> Iterator[str]:
    """Yield patterns that match a value as text, with any of its characters escaped, in base64 and in hexadecimal."""
    yield "".join(map(_escapes, value))
    yield f"(?i:{value.encode().hex()})"
    encodable = ("utf-8", "latin-1") if max(value) < "\u0100" else ("utf-8",)
    for data in {value.encode(encoding) for encoding in encodable}:
        # In "user:password" the value begins at any of three places in a group of three bytes.
        for offset, unsure in ((0, 0), (1, 2), (2, 3)):
            length = (offset + len(data)) * 8 // 6  # characters that no later byte changes
            core = base64.b64encode(bytes(offset) + data).decode()[unsure:length]
            if len(core) >= SHORTEST:
                inner = "".join("(?:[+-]|%2[Bb])" if c == "+" else "(?:[/_]|%2[Ff])" if c == "/" else c for c in core)
                yield rf"[\w+/-]*{inner}[\w+/-]*(?:=|%3[Dd])*"


def _escapes(character: str) -> str:
    """Return a pattern for a character: plain, or escaped as in addresses, JSON, Python and HTML."""
    code, quoted = ord(character), "".join(f"%(?:25)*{byte:02x}" for byte in character.encode())
    named = {"&": "|&amp;", "<": "|&lt;", ">": "|&gt;", '"': "|&quot;", "'": "|&apos;", " ": r"|\+"}.get(character, "")
    python = rf"|\\x{code:02x}" if code < 256 else ""
    return rf"(?:\\?{re.escape(character)}|(?i:{quoted}|\\u{code:04x}{python}|&\#x0*{code:x};|&\#0*{code};){named})"


class MaskedStream:
    """Text stream that masks the secrets in everything that is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without secrets."""
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write the lines without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def mask_stderr() -> None:
    """Mask the secrets that any library writes to stderr, in messages, warnings and tracebacks."""
    if not isinstance(sys.stderr, MaskedStream):
        sys.stderr = cast(TextIO, MaskedStream(sys.stderr))
