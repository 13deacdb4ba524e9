"""The paired difference on texts of a Markov source, where the true difference of two models is known."""

import math

import numpy as np
import pytest

from minigpt.errors import UserError
from minigpt.evaluation import paired
from minigpt.evaluation.character_losses import CharacterLosses, LossRecorder
from minigpt.evaluation.paired import BATCHES, batch_means, difference

V, REGIMES, STAY = 5, 3, 0.995
"""Characters, and regimes of the source. A regime lasts for 200 characters on average, like a scene of a play."""

PAIRS, CHARACTERS = 200, 24_000
"""Simulated texts, of the size of the validation split of data/drama.txt."""


def simulate(seed=0):
    """Return losses of two models on PAIRS texts of one source, (2, PAIRS, CHARACTERS), and their true difference.

    The source is a Markov chain over pairs of a hidden regime and a character. Each model knows the probabilities of
    a character after another one, with errors of its own. Its expected loss follows from the stationary distribution.
    """
    random = np.random.default_rng(seed)
    source = random.dirichlet(np.ones(V), (REGIMES, V))
    models = np.stack([0.7 * source.mean(0) + 0.3 * random.dirichlet(np.ones(V), V) for _ in range(2)])
    regime = np.full((REGIMES, REGIMES), (1 - STAY) / (REGIMES - 1)) + np.eye(REGIMES) * (STAY - (1 - STAY) / 2)
    chain = np.einsum("rs,sab->rasb", regime, source).reshape(REGIMES * V, REGIMES * V)
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    joint = stationary / stationary.sum() * chain.T  # (next state, state)
    characters = joint.reshape(REGIMES, V, REGIMES, V).sum((0, 2)).T  # (V, V): previous, next
    truth = (characters * -np.log(models)).sum((1, 2))

    cumulated, draws = chain.cumsum(1), random.random((CHARACTERS, PAIRS))
    states = np.empty((CHARACTERS + 1, PAIRS), np.int64)
    states[0] = np.searchsorted(np.cumsum(stationary / stationary.sum()), random.random(PAIRS))
    for step in range(CHARACTERS):
        states[step + 1] = np.minimum((cumulated[states[step]] < draws[step][:, None]).sum(1), REGIMES * V - 1)
    text = states % V
    return -np.log(models[:, text[:-1], text[1:]]).transpose(0, 2, 1), truth[1] - truth[0]


def losses(nats, text="text"):
    recorder = LossRecorder(len(nats))
    recorder.extend(nats)
    return recorder.result(text)


@pytest.fixture(scope="module")
def simulated():
    return simulate()


def test_interval_covers_the_true_difference_of_correlated_losses(simulated):
    nats, truth = simulated
    estimates = [difference(losses(first), losses(second)) for first, second in zip(*nats, strict=True)]
    covered = sum(abs(estimate.value - truth) <= estimate.margin for estimate in estimates)
    assert 0.92 * PAIRS <= covered <= 0.98 * PAIRS
    # Single characters as the unit would be too confident, because neighbors depend on each other.
    naive = [(second - first).std() / math.sqrt(CHARACTERS) for first, second in zip(*nats, strict=True)]
    errors = [abs(estimate.value - truth) for estimate in estimates]
    assert sum(error <= 1.96 * each for error, each in zip(errors, naive, strict=True)) < 0.9 * PAIRS


def test_paired_error_is_smaller_than_that_of_independent_losses(simulated):
    first, second = map(losses, simulated[0][:, 0])
    independent = math.hypot(paired.loss(first).standard_error, paired.loss(second).standard_error)
    assert difference(first, second).standard_error < independent


def test_difference_is_that_of_the_losses_and_changes_its_sign(simulated):
    first, second = map(losses, simulated[0][:, 0])
    found = difference(first, second)
    assert found.value == pytest.approx(paired.loss(second).value - paired.loss(first).value, rel=1e-6)
    assert difference(second, first) == paired.Estimate(-found.value, found.standard_error)
    assert difference(first, first) == paired.Estimate(0, 0)
    assert not difference(first, first).significant


def test_error_of_batches_equals_the_formula_by_hand():
    nats = np.random.default_rng(0).random(3000).astype(np.float32)
    means = nats.astype(np.float64).reshape(BATCHES, 150).mean(1)
    found = batch_means(nats, np.ones(3000, np.int64))
    assert found.value == pytest.approx(means.mean())
    assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(BATCHES))


def test_short_text_has_a_loss_without_an_error():
    found = batch_means(np.ones(900, np.float32), np.ones(900, np.int64))
    assert found.value == 1
    assert math.isnan(found.standard_error)
    assert not found.significant


def test_other_text_is_rejected():
    first = losses(np.ones(2000))
    for other in (losses(np.ones(2000), "another text"), losses(np.ones(2001))):
        with pytest.raises(UserError, match=r"the validation texts differ \(2,000 and 2,00[01] characters\)"):
            difference(first, other)
    wider = CharacterLosses(np.ones(1000, np.float32), 2, 2000, "text")
    with pytest.raises(UserError, match="segments of 1 and 2 characters"):
        difference(first, wider)
