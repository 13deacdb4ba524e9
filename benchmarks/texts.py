"""A large text, and the usual way to encode one; without torch, whose memory would count.

python -m benchmarks.texts TARGET MEGABYTES
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def parts(count: int) -> list[bytes]:
    """Different megabytes (10^6 bytes, about) of random Latin and Devanagari letters."""
    draw = np.random.Generator(np.random.Philox(key=[0, 0]))
    latin = np.array(list("abcdefghijklmnopqrstuvwxyz     ,.\n"))
    devanagari = np.array([chr(point) for point in range(0x905, 0x94E)] + [" "] * 9 + ["\n"])
    return [
        ("".join(draw.choice(latin, 400_000)) + "".join(draw.choice(devanagari, 225_000))).encode()
        for _ in range(count)
    ]


def write_mixed(target: Path, megabytes: int) -> None:
    """Write a text of random letters, 16 different megabytes in turn."""
    made = parts(min(16, megabytes))
    with target.open("wb") as file:
        for number in range(megabytes):
            file.write(made[number % len(made)])


def encode_by_dictionary(source: Path, folder: Path) -> None:
    """All of the text in memory, a dictionary of its characters, a list of their ids, two files."""
    text = source.read_text(encoding="utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        np.array([ids[character] for character in part], dtype=np.uint16).tofile(folder / name)


if __name__ == "__main__":
    write_mixed(Path(sys.argv[1]), int(sys.argv[2]))
