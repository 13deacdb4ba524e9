import numpy as np
import pytest
import torch
from helpers.workspace import ROOT
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.dataset import Corpus, Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.unicode import code_points
from minigpt.evaluation import memorization
from minigpt.evaluation.memorization import GRAM, Copied, compare

short_texts = st.text(alphabet="ab", max_size=40)


def ids(text):
    return np.array(["abcdef\u0915\u093f".index(character) for character in text], dtype=np.uint8)


def brute_force(text, train):
    substrings = [text[i : i + n] for n in range(len(text), 0, -1) for i in range(len(text) - n + 1)]
    longest = next((substring for substring in substrings if substring in train), "")
    grams = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]
    return Copied(text.find(longest), len(longest), sum(gram in train for gram in grams), len(grams))


@given(texts=st.lists(short_texts, min_size=1, max_size=3), train=short_texts, chunk=st.integers(1, 50))
def test_copied_substrings_match_brute_force(texts, train, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorization, "CHUNK", chunk)
        found = memorization.find_copied([ids(text) for text in texts], ids(train))
    assert found == [brute_force(text, train) for text in texts]


@given(
    text=st.text(alphabet="abcde\u0915\u093f", max_size=60), train=st.text(alphabet="abcdf\u0915\u093f", max_size=200)
)
def test_substring_ends_at_a_character_the_other_text_lacks(text, train):
    assert memorization.find_copied([ids(text)], ids(train)) == [brute_force(text, train)]


def test_substring_across_chunks_is_found_whole(monkeypatch):
    train = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint8)
    copied = train[4_000:4_700]
    monkeypatch.setattr(memorization, "CHUNK", 1000)
    (found,) = memorization.find_copied([np.concatenate([[51, 52], copied, [53]])], train)
    assert found == Copied(2, 700, 693, 696)


def test_chunks_of_a_very_long_text_are_spread_from_end_to_end(monkeypatch):
    train = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint8)
    monkeypatch.setattr(memorization, "CHUNK", 1000)
    monkeypatch.setattr(memorization, "MAX_SEARCHED", 5000)
    found = memorization.find_copied([train[begin : begin + 20] for begin in (200, 19_950, 1500)], train)
    assert [copied.length for copied in found[:2]] == [20, 20]
    assert found[2].length < 20  # it is between two chunks


def corpus_of(text, val_characters):
    points = code_points(text)
    tokenizer = Tokenizer("".join(sorted(set(text))))
    tokens = torch.from_numpy(tokenizer.encode_known(points))
    return Corpus(Split(tokens[:-val_characters]), Split(tokens[-val_characters:]), tokenizer, "")


def test_prompt_is_not_searched_for_and_the_copied_text_is_quoted():
    text = (ROOT / "data/songs.txt").read_text()
    corpus = corpus_of(text, 1500)
    copied, mixed = text[5000:5060], text[300:330][::-1]
    rows, summary = compare([(text[:200], text[:200] + mixed), (text[4999], text[4999] + copied)], corpus)
    assert [row["characters"] for row in rows] == [30, 60]
    assert rows[1]["run"] == copied and rows[1]["longest_run"] == 60 and rows[1]["share_of_8_grams"] == 1
    assert rows[0]["run"] in text[:-1500] and rows[0]["run"] in mixed
    assert rows[0]["longest_run"] == len(rows[0]["run"]) < 30
    assert summary["memorized"]["longest_run"] == 60
    assert 0 < summary["memorized"]["share_of_8_grams"] < 1
    held_out = [brute_force(text[-1500:][begin:end], text[:-1500]) for begin, end in ((0, 30), (1440, 1500))]
    assert summary["held_out"]["longest_run"] == max(copied.length for copied in held_out)
    grams, total = sum(copied.grams for copied in held_out), sum(copied.total for copied in held_out)
    assert summary["held_out"]["share_of_8_grams"] == grams / total


def test_empty_text_has_no_copied_substring():
    rows, summary = compare([("a", "a"), ("b", "b")], corpus_of("abcabcabc", 4))
    assert [row["longest_run"] for row in rows] == [0, 0]
    assert [row["run"] for row in rows] == ["", ""]
    assert summary == {name: {"longest_run": 0, "share_of_8_grams": 0} for name in ("memorized", "held_out")}


@pytest.mark.parametrize("size, dtype", [(256, np.uint8), (257, np.int16), (32_768, np.int16)])
def test_last_character_of_a_vocabulary_that_fills_its_dtype(size, dtype):
    train = np.full(size + 1, size - 1, dtype)
    assert memorization.find_copied([train[:9]], train) == [Copied(0, 9, 2, 2)]
