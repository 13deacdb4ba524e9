import math

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data import dataset
from minigpt.data.dataset import Split
from minigpt.evaluation.loss import OverlapRecorder, Score, score, window_sums
from minigpt.model import GPT


@pytest.fixture
def model():
    torch.manual_seed(0)
    gpt = GPT(params_with(model={"init": "normal"}).model, 11).double()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt


@pytest.fixture
def split():
    return Split(torch.from_numpy(np.random.default_rng(0).integers(0, 11, 1003).astype(np.uint8)))


@pytest.mark.parametrize("stride", [16, 8, 5])
def test_score_equals_the_sum_over_single_windows(model, split, stride):
    tokens, done, total, start = split.tokens.long(), 0, 0.0, 0
    model.eval()
    while done < len(tokens) - 1:
        stop = min(start + 16, len(tokens) - 1)
        logs = model(tokens[None, start:stop]).log_softmax(-1)[0]
        for index in range(done, stop):
            total -= logs[index - start, tokens[index + 1]].item()
        done, start = stop, start + stride
    result = score(model.train(), split, stride)
    assert result.count == 1002
    assert result.nats == pytest.approx(total, rel=1e-12)
    assert model.training


def test_score_does_not_depend_on_the_batch_size(model, split, monkeypatch):
    expected = score(model, split)
    for windows in (1, 3):
        monkeypatch.setattr(dataset, "EVAL_BATCH_CHARS", {"cpu": 16 * windows})
        scored = score(model, split)
        assert scored.count == expected.count
        assert scored.nats == pytest.approx(expected.nats, rel=1e-12)


@pytest.mark.parametrize("stride", [16, 8, 4, 2])
@pytest.mark.parametrize("length", [2, 9, 17, 33, 40, 41, 57, 100])
def test_overlapping_windows_reuse_those_without_overlap(model, split, stride, length):
    text = Split(split.tokens[:length])
    recorder = OverlapRecorder(16, stride)
    score(model, text, callback=recorder.add)
    assert recorder.finish(model, text) == pytest.approx(score(model, text, stride).loss, rel=1e-12)
    assert recorder.count == length - 1


def test_mode_of_the_model_is_restored_after_an_error(model, split):
    def fail(*_values):
        assert not model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score(model.train(), split, callback=fail)
    assert model.training


def score_of(nats, counts, total):
    """Return the score of windows with these sums of nats and numbers of characters."""
    return Score(window_sums(*(torch.tensor(values, dtype=torch.float64) for values in (nats, counts))).tolist(), total)


def test_units_of_the_loss():
    scored = score_of([20 * math.log(2)], [10], 10)
    assert (scored.loss, scored.bits, scored.perplexity) == (
        pytest.approx(2 * math.log(2)),
        pytest.approx(2),
        pytest.approx(4),
    )


def test_sample_estimates_the_loss_of_the_split(model, split):
    sampled = score(model, split, max_chars=500)
    assert 450 <= sampled.count <= 520
    assert sampled.loss == pytest.approx(score(model, split).loss, rel=0.1)
    assert sampled.total == 1002
    expected = sampled.standard_error * math.sqrt(1 - sampled.count / 1002)
    assert 0 < sampled.sampling_error == pytest.approx(expected)
    assert score(model, split).sampling_error == 0


@pytest.mark.parametrize("stride", [16, 5])
def test_standard_error_is_that_of_a_ratio_over_windows(model, split, stride):
    sums = []
    result = score(
        model, split, stride, callback=lambda batch, _, nats: sums.extend(nats[:, batch.already_scored :].tolist())
    )
    nats, lengths = np.array([sum(row) for row in sums]), np.array([len(row) for row in sums])
    n, deviations = len(sums), nats - result.loss * lengths
    assert result.windows == n
    assert result.standard_error == pytest.approx(
        math.sqrt((deviations**2).sum() / (n - 1) / n) / lengths.mean(), rel=1e-9
    )


def test_standard_error_of_one_window_is_nan(model):
    scored = score(model, Split(torch.arange(10)))
    assert scored.windows == 1
    assert math.isnan(scored.standard_error)


def test_standard_error_matches_the_spread_over_many_texts(model):
    """The texts have one source: each window depends on a random character of its own."""
    random = np.random.default_rng(3)
    scores = []
    for _ in range(60):
        repeated = np.repeat(random.integers(0, 11, 30), 16)
        tokens = np.where(random.random(480) < 0.7, repeated, random.integers(0, 11, 480))
        scores.append(score(model, Split(torch.from_numpy(np.append(tokens, 0)))))
    spread = np.std([one.loss for one in scores], ddof=1)
    assert np.mean([one.standard_error for one in scores]) == pytest.approx(spread, rel=0.25)


def test_sampling_error_matches_the_spread_over_many_samples():
    """The windows have known sums and are drawn at random."""
    random = np.random.default_rng(4)
    sums = 16 * (2 + 0.3 * random.standard_normal(100))
    losses, errors = [], []
    for _ in range(500):
        drawn = random.choice(sums, 60, replace=False)
        one = score_of(drawn, [16] * 60, 1600)
        losses.append(one.loss)
        errors.append(one.sampling_error)
    assert np.std(losses) == pytest.approx(np.mean(errors), rel=0.12)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert score_of([709.0], [1], 1).perplexity == math.exp(709)
    assert score_of([710.0], [1], 1).perplexity == math.inf
    assert math.isnan(score_of([math.nan], [1], 1).perplexity)
