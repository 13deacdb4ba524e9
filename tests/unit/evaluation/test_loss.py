import math

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data import dataset
from minigpt.data.dataset import Split
from minigpt.evaluation.loss import Score, score
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
def test_score_is_the_sum_over_windows_computed_one_by_one(model, split, stride):
    tokens, done, total, start = split.tokens.long(), 0, 0.0, 0
    model.eval()
    while done < len(tokens) - 1:
        stop = min(start + 16, len(tokens) - 1)
        logs = model(tokens[None, start:stop]).log_softmax(-1)[0]
        for position in range(done, stop):
            total -= logs[position - start, tokens[position + 1]].item()
        done, start = stop, start + stride
    result = score(model.train(), split, stride)
    assert result.count == 1002
    assert result.nats == pytest.approx(total, rel=1e-12)
    assert model.training


def test_score_does_not_depend_on_the_batch_size(model, split, monkeypatch):
    whole = score(model, split)
    for windows in (1, 3):
        monkeypatch.setattr(dataset, "EVAL_BATCH_CHARS", {"cpu": 16 * windows})
        again = score(model, split)
        assert again.count == whole.count
        assert again.nats == pytest.approx(whole.nats, rel=1e-12)


def test_units():
    of = Score(nats=20 * math.log(2), count=10, of=10, windows=1, squares=0.0)
    assert (of.loss, of.bits, of.perplexity) == (pytest.approx(2 * math.log(2)), pytest.approx(2), pytest.approx(4))


def test_sampling_a_long_split_estimates_its_loss(model, split):
    sampled = score(model, split, max_chars=500)
    assert 450 <= sampled.count <= 520
    assert sampled.loss == pytest.approx(score(model, split).loss, rel=0.1)
    assert sampled.of == 1002
    expected = sampled.standard_error * math.sqrt(1 - sampled.count / 1002)
    assert 0 < sampled.sampling_error == pytest.approx(expected)
    assert score(model, split).sampling_error == 0


@pytest.mark.parametrize("stride", [16, 5])
def test_the_standard_error_is_that_of_a_ratio_over_windows(model, split, stride):
    sums = []
    result = score(
        model, split, stride, watch=lambda part, _, nats: sums.extend(nats[:, part.already_scored :].tolist())
    )
    nats, lengths = np.array([sum(row) for row in sums]), np.array([len(row) for row in sums])
    n, off = len(sums), nats - result.loss * lengths
    assert result.windows == n
    assert result.standard_error == pytest.approx(math.sqrt((off**2).sum() / (n - 1) / n) / lengths.mean(), rel=1e-9)


def test_one_window_says_nothing_of_the_error(model):
    few = score(model, Split(torch.arange(10)))
    assert few.windows == 1
    assert math.isnan(few.standard_error)


def test_losses_of_many_texts_scatter_as_the_standard_error_says(model):
    """Texts of one source: each window starts anew from a random letter that all of it depends on."""
    random = np.random.default_rng(3)
    scores = []
    for _ in range(60):
        letters = np.repeat(random.integers(0, 11, 30), 16)
        tokens = np.where(random.random(480) < 0.7, letters, random.integers(0, 11, 480))
        scores.append(score(model, Split(torch.from_numpy(np.append(tokens, 0)))))
    spread = np.std([one.loss for one in scores], ddof=1)
    assert np.mean([one.standard_error for one in scores]) == pytest.approx(spread, rel=0.25)


def test_losses_of_many_samples_of_a_split_scatter_as_the_sampling_error_says():
    """The estimator on windows of known sums, drawn at random: their ratio's scatter is what it claims."""
    random = np.random.default_rng(4)
    sums = 16 * (2 + 0.3 * random.standard_normal(100))
    losses, errors = [], []
    for _ in range(500):
        drawn = random.choice(sums, 60, replace=False)
        loss = drawn.sum() / 960
        one = Score(drawn.sum(), 960, 1600, 60, ((drawn - 16 * loss) ** 2).sum())
        losses.append(one.loss)
        errors.append(one.sampling_error)
    assert np.std(losses) == pytest.approx(np.mean(errors), rel=0.12)
