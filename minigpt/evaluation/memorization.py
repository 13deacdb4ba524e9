"""Search for text that a model copied word for word from its training text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.data.dataset import Corpus
from minigpt.data.unicode import code_points

CHUNK = 1 << 20
"""Characters of the training text that are searched at a time, or the length of the longest text if that is more."""

MAX_SEARCHED = 1 << 28
"""Characters of the training text that are searched: evenly spaced chunks of a longer one, about a minute's work."""

GRAM = 8
"""Length of the substrings that are counted."""

Ids = NDArray[Any]


@dataclass(frozen=True)
class Copied:
    """Substrings of one text that occur in the training text.

    The longest one is given by ``start`` and ``length``; it is the first one of several. Of the ``total`` substrings of
    8 characters in the text, ``grams`` occur in the training text.
    """

    start: int
    length: int
    grams: int
    total: int


def find_copied(texts: list[Ids], train: Ids) -> list[Copied]:
    """Find the substrings of each of at least one text that occur in the training text, which may be a memory map.

    If the training text is longer than MAX_SEARCHED, only a sample is searched, and the results are lower bounds.
    """
    ends = np.cumsum([len(text) + 1 for text in texts])
    joined = np.concatenate([part for text in texts for part in (text, [-1])]).astype(np.int64)  # -1 separates texts
    longest = max(map(len, texts))
    alphabet = np.unique(joined)[1:]
    written, step = _rank(joined, alphabet), max(CHUNK, longest)
    lengths = np.zeros(len(joined), np.int64)
    begins = range(0, len(train) if longest else 0, step)
    most = max(1, MAX_SEARCHED // step)
    for begin in begins if len(begins) <= most else np.linspace(0, begins[-1], most).astype(np.int64):
        chunk = _rank(np.asarray(train[begin : begin + step + longest]), alphabet)
        np.maximum(lengths, _match_lengths(written, chunk, len(alphabet)), out=lengths)
    found = []
    for text, own in zip(texts, np.split(lengths, ends[:-1]), strict=True):
        total = max(0, len(text) - GRAM + 1)
        found.append(Copied(int(own.argmax()), int(own.max()), int((own >= GRAM).sum()), total))
    return found


def compare(written: list[tuple[str, str]], corpus: Corpus) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compare the text that a model copied with the text that the validation split shares with the training split.

    ``written`` has pairs of a prompt and a text that begins with it. The prompt is not searched for.

    Returns:
        one row per text, with the longest copied substring, and a summary of the texts (``memorized``) and of equally
        long excerpts of the validation split (``held_out``).
    """
    train, val = corpus.train.tokens.numpy(force=True), corpus.val.tokens.numpy(force=True)
    texts = [text[len(prompt) :] for prompt, text in written]
    begins = np.linspace(0, max(0, len(val) - max(map(len, texts))), len(texts)).astype(int)
    held_out = [val[begin : begin + len(text)] for begin, text in zip(begins, texts, strict=True)]
    found = find_copied([*(corpus.tokenizer.encode_known(code_points(text)) for text in texts), *held_out], train)
    rows = [
        {
            "prompt": prompt,
            "text": number,
            "characters": len(text),
            **_summary([copied]),
            "run": text[copied.start : copied.start + copied.length],
        }
        for number, ((prompt, _), text, copied) in enumerate(zip(written, texts, found, strict=False), 1)
    ]
    return rows, {"memorized": _summary(found[: len(texts)]), "held_out": _summary(found[len(texts) :])}


def _summary(found: list[Copied]) -> dict[str, float]:
    grams, total = sum(copied.grams for copied in found), sum(copied.total for copied in found)
    return {"longest_run": max(copied.length for copied in found), "share_of_8_grams": grams / max(1, total)}


def _match_lengths(text: Ids, train: Ids, n_characters: int) -> Ids:
    """Return the length of the longest match in ``train`` from each position of ``text``; -1 matches nothing.

    Substrings of both grow by one character per round. Equal ones have the same label: their rank among the
    substrings of ``text`` of that length, found by the label of all but the last character, and that character.
    Substrings that the other side lacks are dropped, so that few remain after some rounds. No hash is involved, so
    the result is exact.
    """
    lengths = np.zeros(len(text), np.int64)
    starts, train_starts = np.flatnonzero(text >= 0), np.flatnonzero(train >= 0)
    labels, train_labels = np.zeros(len(starts), np.int64), np.zeros(len(train_starts), np.int64)
    length = 0
    while len(starts):
        starts, labels = _extend(text, starts, labels, length, n_characters)
        train_starts, train_labels = _extend(train, train_starts, train_labels, length, n_characters)
        distinct, labels = np.unique(labels, return_inverse=True)
        train_labels = _rank(train_labels, distinct)
        train_starts, train_labels = train_starts[train_labels >= 0], train_labels[train_labels >= 0]
        shared = np.bincount(train_labels, minlength=len(distinct)) > 0
        starts, labels = starts[shared[labels]], labels[shared[labels]]
        length += 1
        lengths[starts] = length
    return lengths


def _extend(text: Ids, starts: Ids, labels: Ids, length: int, n_characters: int) -> tuple[Ids, Ids]:
    """Extend substrings of ``length`` characters by the next one, and drop those that no known character follows."""
    inside = np.searchsorted(starts, len(text) - length)
    following = text[starts[:inside] + length]
    known = following >= 0
    return starts[:inside][known], labels[:inside][known] * n_characters + following[known]


def _rank(values: Ids, distinct: Ids) -> Ids:
    """Return the rank of each value among sorted, distinct values; -1 for a value that is not among them."""
    if not len(distinct) or not len(values):
        return np.full(len(values), -1)
    if (limit := int(max(values.max(), distinct[-1])) + 1) <= len(values):  # a table is faster in most rounds
        table = np.full(limit, -1)
        table[distinct] = np.arange(len(distinct))
        return np.where(values < 0, -1, table[values])
    ranks = np.minimum(np.searchsorted(distinct, values), len(distinct) - 1)
    return np.where(distinct[ranks] == values, ranks, -1)
