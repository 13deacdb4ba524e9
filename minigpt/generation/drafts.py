"""Guesses at what comes next, which a model checks several at a time: speculative decoding (Leviathan et al. 2023).

Reading four characters takes a small model hardly longer than reading one. So cheap guesses are read along with the
last character, and those that are what the model would have written are kept. Here what it writes at a place follows
from its logits and from a random number that was fixed beforehand: a guess is right or wrong, and the text is the one
that would have been written without guesses. (Unless the decoder is compiled, sums may be rounded otherwise beside
other rows: with bfloat16 or int8 weights, a character in some hundred falls to the other side of its random number, and
the text goes on from there.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDERS = (5, 3)
"""How many last characters a guess is made from; the first that has a guess makes it."""

BITS = 16

LAST_CHARACTERS = 5_000_000
"""Of a longer text, as many from its end are counted."""

LEAST_SHARE = 0.3

_FACTOR = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio (Knuth 1973, multiplicative hashing)


class Drafts:
    """For the last few characters, the one that most often came next in a text; equal hashes share an entry.

    Args:
        tables: for each of ORDERS, ids by hash, int (2**BITS,); -1 where there is no guess.
    """

    def __init__(self, tables: dict[int, NDArray[Any]]) -> None:
        self.tables = tables
        self._lists = [(order, tables[order].tolist()) for order in ORDERS]

    @classmethod
    def of(cls, tokens: NDArray[Any], vocab_size: int) -> Drafts:
        """Count a text: ids (n,), each in [0, vocab_size)."""
        tokens = tokens[-LAST_CHARACTERS:].astype(np.uint64)
        return cls({order: _most_frequent(tokens, order, vocab_size) for order in ORDERS})

    def after(self, ids: Sequence[int], count: int) -> list[int]:
        """Guesses at what follows ``ids``: at most ``count``, fewer where the next one is unknown."""
        text, guesses = list(ids[-max(ORDERS) :]), list[int]()
        while len(guesses) < count and (guess := self._next(text)) >= 0:
            guesses.append(guess)
            text.append(guess)
        return guesses

    def _next(self, text: list[int]) -> int:
        for order, table in self._lists:
            if len(text) >= order:
                key = 0
                for character in text[-order:]:
                    key = key * _FACTOR + character + 1
                if (guess := table[(key * _FACTOR & 0xFFFFFFFFFFFFFFFF) >> (64 - BITS)]) >= 0:
                    return int(guess)
        return -1


def _most_frequent(tokens: NDArray[np.uint64], order: int, vocab_size: int) -> NDArray[Any]:
    """By hash of ``order`` characters, the most frequent next one, where it is seen twice and often enough; else -1."""
    table = np.full(1 << BITS, -1, np.int16 if vocab_size < 1 << 15 else np.int32)
    keys = np.zeros(max(0, len(tokens) - order), np.uint64)
    for back in range(order):
        keys = keys * np.uint64(_FACTOR) + tokens[back : back + len(keys)] + np.uint64(1)
    slots = keys * np.uint64(_FACTOR) >> np.uint64(64 - BITS)
    pairs, counts = np.unique(slots * np.uint64(vocab_size) + tokens[order:], return_counts=True)
    places, characters = (part.astype(np.int64) for part in np.divmod(pairs, np.uint64(vocab_size)))
    seen = np.bincount(places, counts, 1 << BITS)[places]
    ascending = np.argsort(counts, kind="stable")  # what is written last to a place stays
    sure = (counts >= LEAST_SHARE * seen) & (counts > 1)
    table[places[ascending]] = np.where(sure, characters, -1)[ascending]
    return table
