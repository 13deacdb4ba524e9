import math

import numpy as np
import pytest
from helpers.workspace import ROOT, SHAKESPEARE

from minigpt.data.unicode import code_points
from minigpt.evaluation import ngrams
from minigpt.evaluation.ngrams import NGrams, count_ngrams, discounts, score_ngrams, unique


def markov(order, vocab_size, length, seed=0):
    """Return a random text whose characters depend on the last ``order``, and its entropy in nats per character."""
    random = np.random.default_rng(seed)
    table = random.dirichlet(np.full(vocab_size, 0.5), vocab_size**order)
    draws, tokens, nats = random.random(length), [0] * order, 0.0
    for draw in draws:
        context = 0
        for token in tokens[-order:] if order else ():
            context = context * vocab_size + token
        chosen = min(int(np.searchsorted(np.cumsum(table[context]), draw)), vocab_size - 1)
        nats -= math.log(table[context, chosen])
        tokens.append(chosen)
    return np.array(tokens[order:]), nats / length


def ngram_losses(train, val, vocab_size):
    return score_ngrams(count_ngrams(train, vocab_size), val)


def ids_of(text):
    known, ids = np.unique(code_points(text), return_inverse=True)
    return ids, len(known)


def probabilities(train, vocab_size, context):
    """Return the probability of each character after ``context`` under each order, shape (order, V)."""
    model = NGrams(np.asarray(train), vocab_size)
    ends = [model.nats(np.array([*context, character]))[:, -1] for character in range(vocab_size)]
    return np.exp(-np.stack(ends, 1))


def test_probabilities_sum_to_one():
    random = np.random.default_rng(1)
    train = random.integers(0, 5, 400) * random.integers(0, 2, 400)
    for context in ([0], [4, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 1, 2], [6, 6], [5, 0, 0], train[-6:], train[:6]):
        sums = probabilities(train, 7, context).sum(1)  # 5 and 6 were never seen
        np.testing.assert_allclose(sums, 1, rtol=1e-12)


def brute_force(train, val, vocab_size, order):
    """Return -ln p of the last character of ``val``, by the formulas and with dictionaries."""

    def grams(n):
        counts = {}
        for start in range(len(train) - n + 1):
            gram = tuple(train[start : start + n])
            counts[gram] = counts.get(gram, 0) + 1
        return counts

    def distinct(n):
        before = {gram: {"the start"} if gram == tuple(train[:n]) else set() for gram in grams(n)}
        for longer in grams(n + 1):
            before[longer[1:]].add(longer[0])
        return {gram: len(found) for gram, found in before.items()}

    def probability(n, counts, context, character):
        if n == 0:
            return 1 / vocab_size
        own, rest = tuple(context[len(context) - n + 1 :]), context
        lower = probability(n - 1, distinct(n - 1) if n > 1 else None, rest, character)
        follow = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == own}
        if not follow or len(context) < n - 1:
            return lower
        taken = discounts(np.array(list(counts.values())))
        total = sum(follow.values())
        left = sum(taken[min(count, 3)] for count in follow.values())
        count = follow.get(character, 0)
        return max(count - taken[min(count, 3)], 0) / total + left / total * lower

    return -math.log(probability(order, grams(order), list(val[:-1]), val[-1]))


def test_every_order_matches_the_formulas():
    random = np.random.default_rng(2)
    train = random.integers(0, 4, 120) * random.integers(0, 2, 120)
    model = NGrams(train, 4)
    for length in (2, 3, 5, 9):
        val = random.integers(0, 4, length)
        expected = [brute_force(train, val, 4, order) for order in range(1, 7)]
        np.testing.assert_allclose(model.nats(val)[:, -1], expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_unique_keys_are_the_same_by_tables_and_by_sorting(size):
    keys = np.random.default_rng(size).integers(0, size, 1000)
    for table, by_sorting in zip(unique(keys, size), unique(keys, len(keys) + 1), strict=True):
        np.testing.assert_array_equal(table, by_sorting)


def test_trigram_reaches_the_entropy_of_a_source_of_order_two():
    tokens, entropy = markov(2, 5, 60_000)
    found = ngram_losses(tokens[:50_000], tokens[50_000:], 5)
    assert found["3-gram"] == pytest.approx(entropy, abs=0.02)
    assert found["2-gram"] > entropy + 0.1
    assert entropy - 0.02 < found["6-gram"] < entropy + 0.1
    assert found["uniform"] == pytest.approx(math.log(5))


def test_unigram_reaches_the_entropy_of_a_source_of_order_zero():
    tokens, entropy = markov(0, 30, 60_000)
    found = ngram_losses(tokens[:50_000], tokens[50_000:], 30)
    assert found["unigram"] == pytest.approx(entropy, abs=0.02)


def test_every_target_is_scored_once_with_any_chunk_size(monkeypatch):
    ids, vocab_size = ids_of((ROOT / "data/songs.txt").read_text())
    expected = ngram_losses(ids[:-1500], ids[-1500:], vocab_size)
    monkeypatch.setattr(ngrams, "CHUNK", 7)
    assert ngram_losses(ids[:-1500], ids[-1500:], vocab_size) == pytest.approx(expected, rel=1e-12)


def test_chunks_of_a_very_long_text_are_spread_from_end_to_end(monkeypatch):
    ids, vocab_size = ids_of((ROOT / "data/songs.txt").read_text())
    train, val = ids[:-1500], ids[-1500:]
    ends = [ngram_losses(train, val[:101], vocab_size), ngram_losses(train, val[1295:1401], vocab_size)]
    monkeypatch.setattr(ngrams, "CHUNK", 100)
    monkeypatch.setattr(ngrams, "MAX_VAL_CHARS", 200)
    found = ngram_losses(train, val, vocab_size)
    # 105 targets: scored alone, the second chunk also scores the five characters that are its context.
    assert found["unigram"] == pytest.approx((100 * ends[0]["unigram"] + 105 * ends[1]["unigram"]) / 205, rel=0.02)
    assert found["unigram"] != pytest.approx(ngram_losses(train, val[:200], vocab_size)["unigram"], rel=1e-6)


def test_losses_of_devanagari_and_of_thousands_of_characters():
    ids, vocab_size = ids_of((ROOT / "data/songs.txt").read_text())
    found = ngram_losses(ids[:-1800], ids[-1800:], vocab_size)
    values = list(found.values())
    assert values[:5] == sorted(values[:5], reverse=True)
    many = ngram_losses(np.arange(40_000) % 8000, np.arange(8000), 8000)
    assert many["2-gram"] < 0.3
    assert many["unigram"] > 8
    np.testing.assert_allclose(probabilities(np.arange(4000) % 2000, 2000, [5, 6, 7]).sum(1), 1, rtol=1e-9)


def test_end_of_a_long_training_split_is_counted(monkeypatch):
    monkeypatch.setattr(ngrams, "MAX_TRAIN_CHARS", 1000)
    ids, vocab_size = ids_of((ROOT / "data/songs.txt").read_text())
    expected = ngram_losses(ids[-2500:-1500], ids[-1500:], vocab_size)
    assert ngram_losses(ids[:-1500], ids[-1500:], vocab_size) == expected


def test_text_of_two_characters_has_no_longer_ngrams():
    assert list(ngram_losses(np.array([0, 1]), np.array([1, 0, 1]), 2)) == ["uniform", "unigram", "2-gram"]


@pytest.mark.skipif(SHAKESPEARE is None, reason="Tiny Shakespeare is not downloaded")
def test_six_grams_are_best_on_tiny_shakespeare():
    ids, vocab_size = ids_of(SHAKESPEARE.read_text())
    cut = int(len(ids) * 0.9)
    found = ngram_losses(ids[:cut].astype(np.uint8), ids[cut:].astype(np.uint8), vocab_size)
    assert found["6-gram"] == min(found.values()) < 1.6
