import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt.errors import UserError
from minigpt.generation import sampling
from minigpt.generation.sampling import StopStrings, draw_uniforms, filter_probabilities, penalize, sample
from minigpt.params import SamplingParams

PLAIN = {"temperature": 1.0, "top_p": 1.0}


def uniforms(seed, samples, length):
    return np.concatenate(list(draw_uniforms(seed, samples, length)), 1)


def test_each_filter_keeps_the_right_characters():
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64))

    def kept(**how):
        probabilities = filter_probabilities(logits, SamplingParams(**PLAIN | how))[0]
        return (probabilities / probabilities.sum()).tolist()

    assert kept() == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert kept(top_k=2) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.6) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.71) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(top_p=0.01) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=3, top_p=0.99) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(min_p=0.5) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(min_p=1.0) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=2, min_p=0.8) == pytest.approx([1, 0, 0, 0])
    assert kept(temperature=0.5) == pytest.approx((np.array([16, 1, 9, 4]) / 30).tolist())


def test_top_p_drops_characters_after_a_sum_of_exactly_p():
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64))
    assert filter_probabilities(logits, SamplingParams(temperature=1.0, top_p=0.5))[0].count_nonzero() == 1


def test_repetition_penalty_makes_characters_of_the_context_less_likely():
    logits = torch.tensor([[2.0, -1.0, 3.0, -4.0], [2.0, -1.0, 3.0, -4.0]])
    context = torch.tensor([[0, 0, 1], [2, 3, 2]])
    expected = [[1.0, -2.0, 3.0, -4.0], [2.0, -1.0, 1.5, -8.0]]
    assert penalize(logits, context, 2.0).tolist() == expected


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_string(text, stop):
    shown = StopStrings(stop)
    pieces = [shown.add(character) for character in text]
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:  # the stop string that is complete first; among several, the longest
        ended = max((s for s in stop if text[: min(ends)].endswith(s)), key=len)
        assert shown.ended
        assert "".join(pieces) == text[: min(ends) - len(ended)]
    else:
        assert not shown.ended
        assert "".join(pieces) + shown.flush() == text


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    n = 40_000
    draws = torch.from_numpy(uniforms(0, 1, n)[0])
    ids = sample(probabilities.log().expand(n, 4), SamplingParams(**PLAIN), draws)
    share = torch.bincount(ids, minlength=4) / n
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((share - probabilities).abs() < 4 * error).all()


def test_uniforms_are_below_one_and_independent_of_the_batch():
    few, many = uniforms(7, 2, 1000), uniforms(7, 5, 1000)
    assert np.array_equal(few, many[:2])
    assert few.min() >= 0
    assert few.max() < 1
    assert abs(few.mean() - 0.5) < 4 / math.sqrt(12 * 2000)


def test_uniforms_are_drawn_in_chunks_of_one_sequence(monkeypatch):
    whole = uniforms(7, 2, 1000)
    monkeypatch.setattr(sampling, "CHUNK", 13)
    assert next(draw_uniforms(7, 2, 10**12)).shape == (2, 13)
    assert np.array_equal(uniforms(7, 2, 1000), whole)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(temperature, bad):
    logits = torch.tensor([[0.1, 0.2, 0.3], [0.1, bad, 0.3]])
    with pytest.raises(UserError, match="logits that are not finite"):
        sample(logits, SamplingParams(temperature=temperature), torch.tensor([0.5, 0.5]))


EXTREME = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e9]),
    repetition_penalty=st.sampled_from([0.001, 0.5, 1000.0]),
    top_p=st.sampled_from([5e-324, 1e-9, 1.0]),
    min_p=st.sampled_from([0.0, 5e-324, 1.0]),
    top_k=st.sampled_from([0, 1, 10**12]),
)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=8), EXTREME)
def test_extreme_params_keep_the_distribution_finite(logits, how):
    penalized = penalize(torch.tensor([logits]), torch.tensor([[0, 1]]), how.repetition_penalty)
    (chosen,) = sample(penalized, how, torch.tensor([0.999], dtype=torch.float64)).tolist()
    if how.temperature <= 1e-6:
        assert penalized.max() - penalized[0, chosen] <= 100 * how.temperature  # closer ones are equally likely
    if how.temperature:
        probabilities = filter_probabilities(penalized, how)
        assert probabilities.isfinite().all()
        assert probabilities[0, chosen] > 0


def test_long_stop_strings_are_found_in_a_long_text():
    """Comparing every prefix at each character would take several minutes."""
    shown = StopStrings(["a" * 999 + "b", "b" * 1000])
    pieces = [shown.add(character) for character in "a" * 50_000 + "b" * 500]
    assert len("".join(pieces)) == 50_000 - 999
