"""Splits of a text: the characters for training, for validation and for the test.

Every file has three parts in this order, and any of them may be empty. A split is the text of its parts, one after the
other. With the rule ``end``, the cuts are positions in the whole text, so most files are in one split only. With
``each_file``, they are positions in each file.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from minigpt.data.text import Span
from minigpt.errors import UserError
from minigpt.files import read_json, write_json
from minigpt.params import SplitKind

NAMES = ("train", "val", "test")
FILE = "files.json"


@dataclass(frozen=True)
class SplitRule:
    """Fractions of a text that are held out at its end, or at the end of each file."""

    val_fraction: float
    test_fraction: float = 0.0
    kind: SplitKind = "end"

    def cuts(self, characters: int) -> tuple[int, int]:
        """Return where the validation part and the test part of a number of characters begin."""
        val, test = 1 - self.val_fraction - self.test_fraction, 1 - self.test_fraction
        return int(characters * val), int(characters * test)

    def __str__(self) -> str:
        test = f", data.test_fraction = {self.test_fraction}" if self.test_fraction else ""
        return f"data.val_fraction = {self.val_fraction}{test}"


@dataclass(frozen=True)
class Segment:
    """Characters [begin, end) of the text, which are stored at ``position`` of the split ``name``."""

    name: str
    begin: int
    end: int
    position: int


@dataclass(frozen=True)
class FileSizes:
    """Number of characters of a file in each split. The file has its path relative to ``data.source``."""

    file: str
    sizes: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """Place of each character of a text: segments in reading order, and the characters of each split and file."""

    segments: list[Segment]
    sizes: dict[str, int]
    files: list[FileSizes]


def count_files(source: Path, pieces: Iterable[list[Span]], counts: Iterable[list[int]]) -> list[tuple[str, int]]:
    """Return name and characters of each file that is not empty, from the characters of each span of the pieces."""
    names, characters = list[str](), list[int]()
    for piece, numbers in zip(pieces, counts, strict=True):
        for span, number in zip(piece, numbers, strict=True):
            if not span.begin:
                names.append(_name(source, span.path))
                characters.append(0)
            characters[-1] += number
            if span.joined:  # its newline is the end of the file before, and is held out with that end
                characters[-1] -= 1
                characters[-2] += 1
    return list(zip(names, characters, strict=True))


def _name(source: Path, path: str) -> str:
    name = Path(path).relative_to(source).as_posix() if source.is_dir() else source.name
    return os.fsencode(name).decode("utf-8", "replace")  # invalid bytes in a name cannot be written as UTF-8


def lay_out(files: Sequence[tuple[str, int]], rule: SplitRule) -> Layout:
    """Return the place of each character of a text from the name and the number of characters of each file."""
    names = NAMES if rule.test_fraction else NAMES[:2]
    sizes, segments, found = dict.fromkeys(names, 0), list[Segment](), list[FileSizes]()
    total, begin = sum(characters for _, characters in files), 0
    for file, characters in files:
        end = begin + characters
        if rule.kind == "each_file":
            cuts = [begin + cut for cut in rule.cuts(characters)]
        else:
            cuts = [min(max(begin, cut), end) for cut in rule.cuts(total)]
        bounds = [begin, *cuts, end]
        parts = {name: bounds[number + 1] - bounds[number] for number, name in enumerate(names)}
        for start, (name, size) in zip(bounds, parts.items(), strict=False):
            if size:
                segments.append(Segment(name, start, start + size, sizes[name]))
            sizes[name] += size
        found.append(FileSizes(file, parts))
        begin = end
    return Layout(segments, sizes, found)


def overlapping(segments: list[Segment], begin: int, end: int) -> list[Segment]:
    """Return those of the sorted, disjoint ``segments`` that share characters with [begin, end) of the text."""
    first = bisect_right(segments, begin, key=lambda segment: segment.end)
    last = first
    while last < len(segments) and segments[last].begin < end:
        last += 1
    return segments[first:last]


def save_files(folder: Path, files: list[FileSizes]) -> None:
    """Write the characters of each file in each split as JSON."""
    write_json(folder / FILE, [{"file": each.file, **each.sizes} for each in files])


def load_files(folder: Path, sizes: dict[str, int]) -> list[FileSizes]:
    """Read what :func:`save_files` wrote; an empty list if the text is one file.

    Raises:
        UserError: the file is damaged, or its numbers are not those of splits with ``sizes`` characters.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        rows: Any = read_json(path)
        files = [FileSizes(str(row["file"]), {name: int(row[name]) for name in sizes}) for row in rows]
        for name, size in sizes.items():
            parts = [each.sizes[name] for each in files]
            if min(parts) < 0 or sum(parts) != size:
                raise ValueError(f"not the sizes of {name}.npy")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}; create it again with `dvc repro --force prepare`") from None
    return files


def ranges(files: list[FileSizes], name: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each file with a part in the split ``name``, and the begin and end of this part there."""
    ends = accumulate(each.sizes[name] for each in files)
    for each, end in zip(files, ends, strict=True):
        if each.sizes[name]:
            yield each.file, end - each.sizes[name], end
