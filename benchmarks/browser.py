"""Measures of the web page in Chromium, which Playwright drives."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Measured, NotMeasuredError, Options, contender, profile

WRITING = "writing in a page, characters per second"

VOCAB_SIZE = 65


@contender(WRITING, "minigpt, default profile", model="default")
@contender(WRITING, "minigpt, shakespeare-cpu", model="shakespeare-cpu")
@contender(WRITING, "minigpt, published system", model="reference")
def writing_in_a_page(options: Options, model: str) -> Measured:
    """Write 500 characters with random weights, after 50 to warm up: one visit to the page, as its footer counts it."""
    with opened(model) as (tab, size, _):
        for length in (50, 500):
            write(tab, length, seed=1 + options.round)
        return {"value": tab.evaluate("desk.sheets[0].speed"), "megabytes": size / 1e6}


@contender("first character in a page, seconds", "minigpt, default profile", model="default")
def first_in_a_page(options: Options, model: str) -> Measured:
    """Time from the opening of the file to the first character, with a reader who presses Write immediately."""
    with opened(model) as (tab, _, since):
        write(tab, 1, seed=1 + options.round)
        return {"value": time.perf_counter() - since}


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[Any, int, float]]:
    """Open a page with the model of a profile; yield it, its size in bytes, and the time when it was opened."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise NotMeasuredError("Chromium is not installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "page.html"
        size = build(name, path)
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = browser.new_page()
        since = time.perf_counter()
        tab.goto(path.as_uri())
        yield tab, size, since
        browser.close()


def build(name: str, path: Path) -> int:
    """Write a page for the model of a profile, with random weights, and return its size in bytes."""
    import torch

    from minigpt.data.tokenizer import Tokenizer
    from minigpt.model import GPT
    from minigpt.page.facts import PageModel, build_page

    torch.manual_seed(1337)
    tokenizer = Tokenizer("\n" + "".join(map(chr, range(ord(" "), ord(" ") + VOCAB_SIZE - 1))))
    model = GPT(profile(name).model, tokenizer.vocab_size).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return build_page([PageModel(name, model, tokenizer)], path)


def write(tab: Any, length: int, seed: int) -> None:
    """Press Write and wait for the text."""
    tab.evaluate("(values) => desk.settings.set(values)", {"max_new_tokens": length, "temperature": 1, "seed": seed})
    tab.click("#write")
    tab.wait_for_selector("body:not(.writing)", timeout=300_000)
