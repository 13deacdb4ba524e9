"""Texts to measure with, and the usual way to encode one; without torch, whose memory would count.

python -m benchmarks.texts TARGET MEGABYTES        random letters
python -m benchmarks.texts TARGET source           source code of Python's standard library, 1.1 million characters
python -m benchmarks.texts TARGET manual           Python's language reference, as pydoc has it
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np

SOURCE_CHARACTERS = 1_100_000


def parts(count: int) -> list[bytes]:
    """Return different megabytes (10^6 bytes, about) of random Latin and Devanagari letters."""
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


def write_source(target: Path) -> None:
    """Write modules of the standard library, in alphabetical order, up to 1.1 million characters."""
    written = 0
    with target.open("w", encoding="utf-8") as file:
        for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = module.read_text(encoding="utf-8")
            if text.isascii() and written + len(text) <= SOURCE_CHARACTERS:
                written += file.write(text)


def write_manual(target: Path) -> None:
    """Write the topics of ``help()`` in alphabetical order."""
    from pydoc_data.topics import topics

    target.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")


def encode_by_dictionary(source: Path, folder: Path) -> None:
    """Encode with the text in memory, a dictionary of its characters and a list of their ids; write two files."""
    text = source.read_text(encoding="utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
        np.array([ids[character] for character in part], dtype=np.uint16).tofile(folder / name)


WRITERS = {"source": write_source, "manual": write_manual}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.texts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the file")
    parser.add_argument("what", help=f"{', '.join(WRITERS)}, or megabytes")
    options = parser.parse_args()
    if options.what in WRITERS:
        WRITERS[options.what](options.target)
    elif options.what.isdecimal():
        write_mixed(options.target, int(options.what))
    else:
        parser.error(f"expected {', '.join(WRITERS)}, or a number of megabytes, got {options.what!r}")
