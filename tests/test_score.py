import math

import numpy as np
import pytest
import torch
from conftest import params_with

from minigpt import corpus
from minigpt.corpus import Split
from minigpt.model import GPT
from minigpt.score import Score, score


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
        monkeypatch.setattr(corpus, "SWEEP_CHARS", {"cpu": 16 * windows})
        again = score(model, split)
        assert again.count == whole.count
        assert again.nats == pytest.approx(whole.nats, rel=1e-12)


def test_units():
    of = Score(nats=20 * math.log(2), count=10)
    assert (of.loss, of.bits, of.perplexity) == (pytest.approx(2 * math.log(2)), pytest.approx(2), pytest.approx(4))


def test_sampling_a_long_split_estimates_its_loss(model, split):
    sampled = score(model, split, max_chars=500)
    assert 450 <= sampled.count <= 520
    assert sampled.loss == pytest.approx(score(model, split).loss, rel=0.1)
