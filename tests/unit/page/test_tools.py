import math
import random

import pytest
from helpers.page import Engine

from minigpt.page.html import FOLDER


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    engine.v8.eval((FOLDER / "tools.js").read_text(encoding="utf-8"))
    return engine


def starts_of_writer(prompt, written, context, overflow):
    """Return the first character of the context of each written character, as Generator keeps it."""
    start, starts = max(0, prompt - context), []
    for end in range(prompt, prompt + written):
        if end - start > context:
            start = end - (context if overflow == "slide" else max(1, context // 2))
        starts.append(start)
    return starts


@pytest.mark.parametrize("overflow", ["reread", "slide"])
@pytest.mark.parametrize("context", [2, 3, 8])
def test_context_starts_where_the_writer_starts_it(engine, context, overflow):
    for prompt in (1, context, context + 1, 3 * context + 1):
        indices = list(range(prompt, prompt + 40))
        starts = engine.run(
            "return indices.map((index) => contextStart(index, prompt, config, overflow))",
            indices=indices, prompt=prompt, config={"block_size": context}, overflow=overflow,
        )  # fmt: skip
        assert starts == starts_of_writer(prompt, 40, context, overflow)


@pytest.mark.parametrize("overflow", ["reread", "slide"])
@pytest.mark.parametrize("context", [2, 3, 8])
def test_characters_of_a_long_prompt_share_a_few_contexts(engine, context, overflow):
    indices = list(range(1, 20 * context))
    starts = engine.run(
        "return indices.map((index) => contextStart(index, prompt, config, overflow))",
        indices=indices, prompt=21 * context, config={"block_size": context}, overflow=overflow,
    )  # fmt: skip
    assert all(
        min(index, context // 2) <= index - start <= context for index, start in zip(indices, starts, strict=True)
    )
    assert len(set(starts)) <= 20 * context / (context // 2)


@pytest.mark.parametrize("taps", [1, 4])
def test_context_of_a_rolling_cache_has_all_characters_that_matter(engine, taps):
    config = {"block_size": 8, "n_layer": 3, "attention_window": 0, "embd_conv": 4, "mlp_conv": taps}
    starts = engine.run(
        "return indices.map((index) => contextStart(index, 1, config, 'roll'))",
        indices=list(range(1, 200)), config=config,
    )  # fmt: skip
    for index, start in enumerate(starts, 1):
        assert start <= max(0, index - 3 * (8 + taps - 1) - 4)


def test_copied_runs_cover_all_copied_characters(engine):
    draw = random.Random(0)
    corpus = "".join(draw.choices("ab", k=400))
    text = "".join(draw.choices("ab", k=60)) + corpus[50:90] + "c" + corpus[200:230] + corpus[10:40]
    runs = engine.run("return [...copiedRuns(text, corpus, 12)].filter(Boolean)", text=text, corpus=corpus)
    covered = set()
    for run in runs:
        start, length, source = run["start"], run["length"], run["source"]
        assert length >= 12 and text[start : start + length] == corpus[source : source + length]
        assert text[start : start + length + 1] not in corpus or start + length == len(text)
        covered |= set(range(start, start + length))
    grams = [start for start in range(len(text) - 11) if text[start : start + 12] in corpus]
    assert covered == {start + i for start in grams for i in range(12)}


def test_surprisal_is_in_bits(engine):
    assert engine.run("return surprisal([0, 0, 0, 0], 1)") == pytest.approx(2)
    logits = [1.5, -2.0, 700.0]
    expected = (700 - 1.5) / math.log(2)
    assert engine.run("return surprisal(logits, 0)", logits=logits) == pytest.approx(expected)


def test_peaks_keep_the_largest_weight_of_each_group(engine):
    assert engine.run("return peaks([1, 2, 3], 64)") == [1, 2, 3]
    assert engine.run("return peaks([9, 1, 2, 4, 3], 2)") == [9, 4]
    assert engine.run("return peaks([7, 0, 5, 0, 0, 0, 0], 3)") == [7, 5, 0]


@pytest.mark.parametrize("low, high", [(0, 1), (1.55, 5.98), (0, 600), (-3, 2000), (2, 2)])
def test_ticks_are_few_and_inside_the_range(engine, low, high):
    found = engine.run("return ticks(low, high)", low=low, high=high)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len(found) <= 7 and (len(found) >= 3 or low == high)


def test_unknown_characters_are_named_with_their_code_points(engine):
    text = engine.run("return describeUnknown('abé\\u0301\\u200b', new Map([['a', 0], ['b', 1]]))")
    assert all(name in text for name in ("é (U+00E9)", "U+0301", "U+200B"))
    assert engine.run("return describeUnknown('ab', new Map([['a', 0], ['b', 1]]))") == ""
