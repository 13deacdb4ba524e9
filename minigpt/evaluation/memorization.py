"""What of a written text stands word for word in the training text: exact up to SEARCHED characters of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.data.dataset import Corpus
from minigpt.data.tokenizer import code_points

CHUNK = 1 << 20
"""Characters of the training text that are searched at a time; more where a written text is longer."""

SEARCHED = 1 << 28
"""Of a longer training text, about as many characters are searched, in chunks spread evenly: about a minute's work."""

GRAM = 8
"""The length of the runs whose share is told."""

Ids = NDArray[Any]


@dataclass(frozen=True)
class Copied:
    """What of one text stands in the training text.

    Attributes:
        start, length: the longest run of characters that does; the first of several.
        grams: how many of the text's runs of 8 characters do.
        of: how many such runs it has.
    """

    start: int
    length: int
    grams: int
    of: int


def find_copied(texts: list[Ids], train: Ids) -> list[Copied]:
    """Search the training text for what was written.

    Args:
        texts: at least one, ids of what was written, each of shape (m,).
        train: ids of the training text, shape (n,); a memory map may be longer than the memory. Of one longer than
            SEARCHED, a sample is searched: what is found is there, and there may be more.
    """
    ends = np.cumsum([len(text) + 1 for text in texts])
    joined = np.concatenate([part for text in texts for part in (text, [-1])]).astype(np.int64)  # -1 keeps them apart
    longest = max(map(len, texts))
    alphabet = np.unique(joined)[1:]
    written, step = _rank(joined, alphabet), max(CHUNK, longest)
    lengths = np.zeros(len(joined), np.int64)
    begins = range(0, len(train) if longest else 0, step)
    most = max(1, SEARCHED // step)
    for begin in begins if len(begins) <= most else np.linspace(0, begins[-1], most).astype(np.int64):
        read = _rank(np.asarray(train[begin : begin + step + longest]), alphabet)
        np.maximum(lengths, _matches(written, read, len(alphabet)), out=lengths)
    found = []
    for text, end in zip(texts, ends, strict=True):
        own = lengths[end - len(text) - 1 : end]
        of = max(0, len(text) - GRAM + 1)
        found.append(Copied(int(own.argmax()), int(own.max()), int((own >= GRAM).sum()), of))
    return found


def compare(written: list[tuple[str, str]], corpus: Corpus) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What of written texts stands in the training split, beside what of as much held-out text does.

    Args:
        written: prompts, and texts that begin with them; the prompts do not count as written.
        corpus: what the writer was trained on.

    Returns:
        a row for each text, with the longest run itself, and a summary.
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
            "longest_run": one.length,
            "share_of_8_grams": one.grams / max(1, one.of),
            "run": text[one.start : one.start + one.length],
        }
        for number, ((prompt, _), text, one) in enumerate(zip(written, texts, found, strict=False), 1)
    ]
    return rows, {"memorised": _summary(found[: len(texts)]), "held_out": _summary(found[len(texts) :])}


def _summary(found: list[Copied]) -> dict[str, float]:
    shared, of = sum(one.grams for one in found), sum(one.of for one in found)
    return {"longest_run": max(one.length for one in found), "share_of_8_grams": shared / max(1, of)}


def _matches(written: Ids, read: Ids, n_characters: int) -> Ids:
    """How long a run from each place of ``written`` stands in ``read``; -1 in either matches nothing.

    The runs of both grow by a character at a time. Equal runs share a name: a rank among those of ``written`` of
    their length, looked up by the name of the run without its last character, and that character. Runs that the
    other side lacks are dropped, so that few are left after some characters. No hash decides.
    """
    lengths = np.zeros(len(written), np.int64)
    ours, theirs = np.flatnonzero(written >= 0), np.flatnonzero(read >= 0)
    our_names, their_names = np.zeros(len(ours), np.int64), np.zeros(len(theirs), np.int64)
    length = 0
    while True:
        ours, our_names = _longer(written, ours, our_names, length, n_characters)
        theirs, their_names = _longer(read, theirs, their_names, length, n_characters)
        runs = np.unique(our_names)
        their_names = _rank(their_names, runs)
        theirs, their_names = theirs[their_names >= 0], their_names[their_names >= 0]
        shared = np.zeros(len(runs), dtype=np.bool_)
        shared[their_names] = True
        our_names = _rank(our_names, runs)
        ours, our_names = ours[shared[our_names]], our_names[shared[our_names]]
        if not len(ours):
            return lengths
        length += 1
        lengths[ours] = length


def _longer(text: Ids, places: Ids, names: Ids, length: int, n_characters: int) -> tuple[Ids, Ids]:
    """The runs of ``length`` characters from ``places`` and the character after each, where there is a known one."""
    inside = np.searchsorted(places, len(text) - length)
    nexts = text[places[:inside] + length]
    known = nexts >= 0
    return places[:inside][known], names[:inside][known] * n_characters + nexts[known]


def _rank(values: Ids, of: Ids) -> Ids:
    """The rank of each value among the sorted, distinct values ``of``; -1 for what is not there."""
    if not len(of):
        return np.full(len(values), -1)
    ranks = np.minimum(np.searchsorted(of, values), len(of) - 1)
    return np.where(of[ranks] == values, ranks, -1)
