from collections import Counter

import numpy as np
import pytest

from minigpt.generation.drafts import ORDERS, Drafts


def test_a_guess_is_what_most_often_came_next():
    tokens = np.random.default_rng(0).integers(0, 3, 4000)
    drafts = Drafts.of(tokens, 3)
    order = max(ORDERS)
    for context in {tuple(tokens[i : i + order]) for i in range(200)}:
        places = [i for i in range(len(tokens) - order) if tuple(tokens[i : i + order]) == context]
        follows = Counter(int(tokens[i + order]) for i in places)
        (guess,) = drafts.after(list(map(int, context)), 1) or [-1]
        if max(follows.values()) > 1:
            assert follows[guess] == max(follows.values())


def test_guesses_go_on_while_the_text_is_known():
    text = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 20
    drafts = Drafts.of(np.array(text, np.uint8), 40)
    assert drafts.after([3, 4, 5], 4) == [6, 7, 8, 9]
    assert drafts.after([20, 3, 30, 3, 4, 5], 4) == [6, 7, 8, 9]
    assert drafts.after([3, 4, 5], 0) == []
    assert drafts.after([4, 5], 4) == []
    assert drafts.after([20, 30, 25, 31, 22], 4) == []


@pytest.mark.parametrize("vocab_size", [3, 40_000])
def test_a_text_too_short_to_count_gives_no_guess(vocab_size):
    assert Drafts.of(np.array([0, 1, 2], np.int32), vocab_size).after([0, 1, 2, 0, 1], 3) == []
