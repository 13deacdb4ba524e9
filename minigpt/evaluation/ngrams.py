"""What a loss is measured against: guessing, counting characters, and n-grams with Kneser-Ney smoothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = 6
"""The longest n-grams, in characters."""

COUNTED = 1 << 22
"""Of a longer training text, so many characters at its end are counted."""

SCORED = 1 << 20
"""Characters scored at a time."""

SCORED_MOST = 1 << 24
"""Of a longer validation text, about so many characters are scored, in parts spread evenly."""

Ids = NDArray[Any]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Discounted:
    """The counts of one order's n-grams, discounted.

    Attributes:
        shares: for each n-gram, its discounted count over the count of its context.
        backoff: for each context, the probability that the discounts leave to the next shorter context; 1 where
            nothing follows it.
    """

    shares: Floats
    backoff: Floats

    @classmethod
    def of(cls, contexts: Ids, counts: Ids, n_contexts: int) -> Discounted:
        """Discount n-grams, given the label of the context and the count of each."""
        taken = discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, n_contexts)
        left = np.bincount(contexts, taken, n_contexts)
        backoff = np.divide(left, totals, out=np.ones(n_contexts), where=totals > 0)
        return cls((counts - taken) / totals[contexts], backoff)

    def mixed(self, places: Ids, known: NDArray[np.bool_], contexts: Ids, lower: Floats) -> Floats:
        """The probabilities of n-grams, those of their ends under a shorter context mixed in.

        Args:
            places: the labels of the n-grams.
            known: whether each was counted; the label of one that was not is ignored.
            contexts: the labels of their contexts; -1 where that was never seen.
            lower: the probabilities of their last characters under the next shorter context.
        """
        backoff = np.where(contexts < 0, 1, self.backoff[contexts])
        return np.where(known, self.shares[places], 0) + backoff * lower


def discounts(counts: Ids) -> Floats:
    """What is taken from counts of 0, 1, 2, and 3 or more, shape (4,).

    Chen and Goodman's estimates (1999, eq. 26), from how many n-grams have counts of 1 to 4. Half an n-gram is added
    to each, and the result kept above 0 and below its count, so that few or no such n-grams leave it defined.
    """
    n1, n2, n3, n4 = (np.bincount(np.minimum(counts, 5), minlength=6)[1:5] + 0.5).tolist()
    share = n1 / (n1 + 2 * n2)
    estimates = [0.0, 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    return np.array([0.0, *np.clip(estimates[1:], 0.05, [0.95, 1.9, 2.85])])


class NGrams:
    """Interpolated n-gram models of every order from 1 to ORDER, counted together.

    Kneser and Ney (1995) in the interpolated form with three discounts of Chen and Goodman (1999). The longest
    n-grams of a model have their counts; the shorter ones that they fall back to, the number of distinct characters
    seen before them. Last of all comes the uniform distribution. Where a context was never seen, the next shorter one
    is used alone.

    An n-gram is labelled with its rank among those of its length, found from the label of its context and its last
    character: so no key outgrows 64 bits, whatever the vocabulary.

    Args:
        tokens: the text that is counted, ids of shape (n,).
        vocab_size: characters V.
        order: the longest n-grams.
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
            grams, first, labels, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if n > 1:  # each n-gram is one distinct character before the shorter one that ends it
                before = np.bincount(contexts[first + 1], minlength=n_contexts)
                before[contexts[:1]] += 1  # and the start of the text is one, too
                shorter = self.grams[-1] // vocab_size
                self.distinct.append(Discounted.of(shorter, before, len(self.raw[-1].backoff)))
            self.grams.append(grams)
            self.raw.append(Discounted.of(grams // vocab_size, counts, n_contexts))
            contexts, n_contexts = labels, len(grams)

    def nats(self, tokens: Ids) -> Floats:
        """-ln p of each character but the first, under the model of each order: shape (order, len(tokens) - 1).

        The context reaches back to the first of ``tokens``, no further.
        """
        lower = np.full(len(tokens) - 1, 1 / self.vocab_size)
        result = np.empty((self.order, len(lower)))
        contexts = np.zeros(len(tokens) + 1, np.int64)  # labels of what stands before each character; -1: never seen
        for n, grams in enumerate(self.grams):
            keys = np.where(contexts[:-1] < 0, -1, contexts[:-1] * self.vocab_size + tokens)
            places = np.minimum(np.searchsorted(grams, keys), len(grams) - 1)
            known = grams[places] == keys
            result[n] = -np.log(self.raw[n].mixed(places[1:], known[1:], contexts[1:-1], lower))
            if n + 1 < self.order:
                lower = self.distinct[n].mixed(places[1:], known[1:], contexts[1:-1], lower)
            contexts = np.concatenate([[-1], np.where(known, places, -1)])
        return result


def losses(train: Ids, val: Ids, vocab_size: int) -> dict[str, float]:
    """Nats per character of ``val``, each target scored once, by models of ``train``.

    Args:
        train: ids of the training split, of which the last COUNTED are counted.
        val: ids of the validation split; a sample of one longer than SCORED_MOST is scored.
        vocab_size: characters V.

    Returns:
        ``uniform`` (ln V), ``unigram``, and ``2-gram`` to ``6-gram``, or as far as the training split is long.
    """
    model = NGrams(np.asarray(train[-COUNTED:]), vocab_size)
    totals, targets = np.zeros(model.order), 0
    starts, most = range(1, len(val), SCORED), max(1, SCORED_MOST // SCORED)
    for start in starts if len(starts) <= most else np.linspace(1, starts[-2], most).astype(np.int64).tolist():
        begin = max(0, start + 1 - ORDER)
        scored = model.nats(np.asarray(val[begin : start + SCORED]))[:, start - begin - 1 :]
        totals += scored.sum(1)
        targets += scored.shape[1]
    names = ["unigram", *(f"{n}-gram" for n in range(2, model.order + 1))]
    return {"uniform": math.log(vocab_size)} | dict(zip(names, (totals / targets).tolist(), strict=True))
