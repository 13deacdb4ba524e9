"""Write in the terminal with a trained model, as it comes.

python -m minigpt "ROMEO:"
echo "ROMEO:" | python -m minigpt --temperature 1 --max-new-tokens 200
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import regex

from minigpt import errors
from minigpt.runtime import cpu


def graphemes(pieces: Iterable[str]) -> Iterator[str]:
    """The text of ``pieces`` in pieces that end where a character, as a reader sees it, ends (Unicode's annex 29)."""
    held = ""
    for piece in pieces:
        *whole, held = regex.findall(r"\X", held + piece) or [""]
        if whole:
            yield "".join(whole)
    yield held


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """A converter of arguments to numbers from ``low`` (or above it) to ``high``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}{most}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def device(text: str) -> str:
    """Check the name of a device."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; there are auto, cpu, cuda, and cuda:1 and so on")
    return text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m minigpt", description="Continue a text with a trained model.")
    add = parser.add_argument
    some, positive, share = number(int, 0), number(float, 0, above=True), number(float, 0, 1)
    shares = number(float, 0, 1, above=True)
    add("prompt", nargs="?", help="what to continue; without it, standard input, or a newline at a terminal")
    add("--model", type=Path, default=Path("models/gpt"), help="folder of the exported model (%(default)s)")
    add("--max-new-tokens", type=some, default=500, help="characters to write at most (%(default)s)")
    add("--temperature", type=number(float, 0), default=0.8, help="0: always the likeliest character (%(default)s)")
    add("--top-k", type=some, default=0, help="only the k likeliest characters; 0: all (%(default)s)")
    add("--top-p", type=shares, default=0.95, help="only the likeliest that together reach this (%(default)s)")
    add("--min-p", type=share, default=0.0, help="only those this many times as likely as the likeliest (%(default)s)")
    add("--repetition-penalty", type=positive, default=1.0, help="above 1: fewer repetitions (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--seed", type=some, help="the same seed gives the same text; without it, a new one each time")
    add(
        "--overflow",
        choices=["reread", "slide", "roll"],
        default="reread",
        help="at a full context (%(default)s)",
    )
    add("--dtype", choices=["auto", "float32", "bfloat16", "int8"], default="auto", help="of the weights (%(default)s)")
    add("--compile", choices=["kept", "always", "never"], default="kept", help="of the decoder (%(default)s)")
    add("--device", type=device, default="auto", help="auto, cpu or cuda (%(default)s)")
    add("--skip-unknown", action="store_true", help="leave characters out that the model never saw")
    return parser.parse_args()


def main() -> None:
    """Write.

    Raises:
        UserError: there is no such model, or the prompt has a character that it does not know.
    """
    wanted = parse()
    prompt: str | None = wanted.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt = prompt or "\n"
    cpu.configure_cpu(spin=True)
    from minigpt.data.tokenizer import describe_character
    from minigpt.generation.generator import Generator
    from minigpt.generation.sampling import SamplingParams
    from minigpt.runtime import device

    try:
        chosen = device.choose_device(wanted.device)
    except errors.UserError:
        raise errors.UserError(f"--device: there is no {wanted.device} here; use auto or cpu") from None
    generator = Generator.load(wanted.model, chosen, wanted.dtype, compiled=wanted.compile)
    tokenizer = generator.tokenizer
    if wanted.skip_unknown:
        prompt, unknown = tokenizer.without_unknown(prompt)
        if unknown:
            print(f"minigpt: left out of the prompt: {', '.join(map(describe_character, unknown))}", file=sys.stderr)
    try:
        tokenizer.encode(prompt, "the prompt")
    except errors.UserError as error:
        raise errors.UserError(f"{error}; --skip-unknown leaves such characters out") from None
    seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
    sampling = SamplingParams(
        wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p, wanted.repetition_penalty, wanted.stop, seed,
        wanted.overflow,
    )  # fmt: skip
    written = (piece for (piece,) in generator.stream(prompt, wanted.max_new_tokens, sampling))
    last = "\n"
    try:
        for text in graphemes(itertools.chain([prompt], written)):
            print(text, end="", flush=True)
            last = text[-1:] or last
    except KeyboardInterrupt:
        print()
        sys.exit(128 + signal.SIGINT)
    if last != "\n":
        print()


def run() -> None:
    """Call :func:`main`; Ctrl-C and a closed pipe end it without a word."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        errors.run(main)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter flushes into it again
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    run()
