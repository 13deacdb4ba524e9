"""Losses to compare a model with: uniform guessing, and n-gram models with Kneser-Ney smoothing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = 6
"""Length of the longest n-grams, in characters."""

MAX_TRAIN_CHARS = 1 << 22
"""Characters that are counted: the last ones of a longer training split."""

CHUNK = 1 << 20
"""Characters that are scored at a time."""

MAX_VAL_CHARS = 1 << 24
"""Characters that are scored, approximately: evenly spaced chunks of a longer validation split."""

Ids = NDArray[Any]
Floats = NDArray[np.float64]


class Discounted:
    """Discounted counts of the n-grams of one order, given the label of the context and the count of each.

    An n-gram's entry of ``frequencies`` is its discounted count divided by the count of its context. A context's entry
    of ``backoff`` is the probability that the discounts leave to the next shorter context; 1 if no character follows.
    """

    def __init__(self, contexts: Ids, counts: Ids, n_contexts: int) -> None:
        discount = discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, n_contexts)
        left = np.bincount(contexts, discount, n_contexts)
        self.frequencies = (counts - discount) / totals[contexts]
        self.backoff = np.divide(left, totals, out=np.ones(n_contexts), where=totals > 0)

    def interpolate(self, labels: Ids, known: NDArray[np.bool_], contexts: Ids, lower: Floats) -> Floats:
        """Return the probabilities of n-grams, interpolated with those of the next shorter n-grams, ``lower``.

        The labels of n-grams that are not ``known``, because they were not counted, are ignored. The label of a context
        that was never seen is -1.
        """
        backoff = np.where(contexts < 0, 1, self.backoff[contexts])
        return np.where(known, self.frequencies[labels], 0) + backoff * lower


def discounts(counts: Ids) -> Floats:
    """Return the discounts of counts of 0, 1, 2, and 3 or more, shape (4,).

    These are the estimates of Chen and Goodman (1999, eq. 26) from the numbers of n-grams with counts of 1 to 4. Each
    number is increased by one half, so that the result is defined when there are no such n-grams. Each discount is at
    least 0.05, so that something is left for unseen characters, and at most 0.95 of its count.
    """
    n1, n2, n3, n4 = (np.bincount(np.minimum(counts, 5), minlength=6)[1:5] + 0.5).tolist()
    share = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    return np.array([0.0, *np.clip(estimates, 0.05, [0.95, 1.9, 2.85])])


class NGrams:
    """Interpolated n-gram models of every order from 1 to ``order``, counted in one pass.

    The smoothing is that of Kneser and Ney (1995), interpolated, with three discounts (Chen and Goodman 1999). The
    longest n-grams of a model have their counts. The shorter ones that it falls back to have the number of distinct
    characters before them. The uniform distribution comes last. If a context was never seen, the next shorter one is
    used alone.

    The label of an n-gram is its rank among the n-grams of its length. It is found by the label of the context and
    the last character, so that a key fits in 64 bits with any vocabulary.
    """

    def __init__(self, tokens: Ids, vocab_size: int, order: int = ORDER) -> None:
        self.vocab_size = vocab_size
        self.order = min(order, len(tokens))
        self.grams: list[Ids] = []
        self.raw: list[Discounted] = []
        self.distinct: list[Discounted] = []
        contexts, n_contexts = np.zeros(len(tokens) + 1, np.int64), 1
        for n in range(1, self.order + 1):
            keys = contexts[:-1] * vocab_size + tokens[n - 1 :]
            grams, first, labels, counts = unique(keys, n_contexts * vocab_size)
            if n > 1:  # each distinct n-gram is one distinct character before the shorter n-gram that ends it
                before = np.bincount(contexts[first + 1], minlength=n_contexts)
                before[contexts[:1]] += 1  # the start of the text counts as a character, too
                shorter = self.grams[-1] // vocab_size
                self.distinct.append(Discounted(shorter, before, len(self.raw[-1].backoff)))
            self.grams.append(grams)
            self.raw.append(Discounted(grams // vocab_size, counts, n_contexts))
            contexts, n_contexts = labels, len(grams)

    def nats(self, tokens: Ids) -> Floats:
        """Return -ln p of each character but the first under the model of each order, (order, len(tokens) - 1).

        The context of a character starts at the first of ``tokens`` or later.
        """
        lower = np.full(len(tokens) - 1, 1 / self.vocab_size)
        result = np.empty((self.order, len(lower)))
        contexts = np.zeros(len(tokens) + 1, np.int64)  # label of the context of each character; -1: never seen
        for n, grams in enumerate(self.grams):
            keys = np.where(contexts[:-1] < 0, -1, contexts[:-1] * self.vocab_size + tokens)
            labels = np.minimum(np.searchsorted(grams, keys), len(grams) - 1)
            known = grams[labels] == keys
            result[n] = -np.log(self.raw[n].interpolate(labels[1:], known[1:], contexts[1:-1], lower))
            if n + 1 < self.order:
                lower = self.distinct[n].interpolate(labels[1:], known[1:], contexts[1:-1], lower)
            contexts = np.concatenate([[-1], np.where(known, labels, -1)])
        return result


def unique(keys: Ids, limit: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Return the same as :func:`numpy.unique` of keys below ``limit``, with all of its optional results.

    These are the sorted distinct keys (K,), the first position of each (K,), the rank of every key (len(keys),), and
    the count of each distinct key (K,). If ``limit`` is small, tables replace the sorting, in a fifth of the time.
    """
    if limit > len(keys):
        return np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    counts, ranks, first = np.bincount(keys, minlength=limit), np.empty(limit, np.int64), np.empty(limit, np.int64)
    found = np.flatnonzero(counts)
    ranks[found] = np.arange(len(found))
    first[keys[::-1]] = np.arange(len(keys))[::-1]  # of several positions, NumPy keeps the last one that is assigned
    return found, first[found], ranks[keys], counts[found]


def count_ngrams(train: Ids, vocab_size: int) -> NGrams:
    """Return n-gram models of the last MAX_TRAIN_CHARS of ``train``."""
    return NGrams(np.asarray(train[-MAX_TRAIN_CHARS:]), vocab_size)


def score_ngrams(model: NGrams, text: Ids, callback: Callable[[Floats], object] | None = None) -> dict[str, float]:
    """Return the nats per character of ``text`` under n-gram models, each target scored once.

    The models are ``uniform`` (ln V), ``unigram``, and ``2-gram`` to ``6-gram``, or fewer if the training text is
    shorter. If ``text`` is longer than MAX_VAL_CHARS, a sample is scored. Otherwise ``callback`` is called with -ln p
    of the next characters under the model of each order, shape (order, n), until all are scored.
    """
    totals, targets = np.zeros(model.order), 0
    starts, most = range(1, len(text), CHUNK), max(1, MAX_VAL_CHARS // CHUNK)
    sampled = len(starts) > most
    for start in np.linspace(1, starts[-2], most).astype(np.int64).tolist() if sampled else starts:
        begin = max(0, start + 1 - ORDER)
        scored = model.nats(np.asarray(text[begin : start + CHUNK]))[:, start - begin - 1 :]
        totals += scored.sum(1)
        targets += scored.shape[1]
        if callback and not sampled:
            callback(scored)
    names = ["unigram", *(f"{n}-gram" for n in range(2, model.order + 1))]
    return {"uniform": math.log(model.vocab_size)} | dict(zip(names, (totals / targets).tolist(), strict=True))
