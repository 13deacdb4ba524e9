"""Tests of NFC: the same as the standard library, in linear time."""

import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import unicode
from minigpt.data.encode import encode_corpus
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.unicode import last_boundary, nfc, nfc_chunks

DEPENDENT = [chr(point) for point in np.flatnonzero(~unicode._tables()[0]).tolist() if not 0xD800 <= point < 0xE000]
OTHERS = list("ae\n\u1100\uac00\u0915\u0f71\u00e9\u1e9b\u4e00\u09c7\u0627\U000110a5")


def normalize(text):
    return unicodedata.normalize("NFC", text)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.sampled_from([3, 30, 700]), size=st.integers(1, 40))
def test_chunks_join_to_the_normal_form_of_the_text(seed, length, size):
    text = "".join(random.Random(seed).choices(DEPENDENT + OTHERS * 50, k=length))
    chunks = [text[begin : begin + size] for begin in range(0, length, size)]
    assert nfc(text) == "".join(nfc_chunks(chunks)) == normalize(text)
    cut = last_boundary(text)
    assert normalize(text[:cut]) + normalize(text[cut:]) == normalize(text)


def test_no_independent_character_composes_with_an_earlier_one():
    found = (unicodedata.decomposition(chr(point)).split() for point in range(sys.maxunicode + 1))
    pairs = [[chr(int(part, 16)) for part in parts] for parts in found if len(parts) == 2 and parts[0][0] != "<"]
    pairs += [("\u1100", "\u1161"), ("\uac00", "\u11a8")]  # Hangul
    composed = [(first, second) for first, second in pairs if len(normalize(first + second)) == 1]
    assert len(composed) > 900
    assert {second for _, second in composed} <= set(DEPENDENT)
    assert not any(last_boundary(first + second) for first, second in composed)
    assert last_boundary("\u4e00\u4e01\u0301") == 1


LONG = {
    "Chinese without a newline": "\u4e2d\u6587\u5b57" * 700_000,
    "equal marks": "a" + "\u0301" * 1_000_000,
    "marks in the wrong order": "a" + "\u0301" * 500_000 + "\u0323" * 500_000,
    "alternating marks": "a" + "\u0301\u0323" * 500_000,
    "marks that decompose": "\u0f40" + "\u0f73\u0344\u0323" * 300_000,
    "final consonants": "\uac00" + "\u11a8" * 1_000_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_long_run_of_marks_is_normalized(tmp_path, kind):  # takes minutes with a quadratic algorithm
    (tmp_path / "a.txt").write_text(LONG[kind] + "\n" + LONG[kind], encoding="utf-8")
    encode_corpus(tmp_path / "a.txt", 0.5, tmp_path, "NFC")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    parts = [np.load(tmp_path / name) for name in ("train.npy", "val.npy")]
    found = "".join(map(tokenizer.decode, parts))
    lines = found.split("\n")
    assert lines[0] == lines[1]
    short = LONG[kind][:999]
    assert nfc(short) == normalize(short)
    assert tokenizer.normalized(LONG[kind]) == lines[0]
