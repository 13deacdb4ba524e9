"""Tests of loss scaling, in trainings in float16 on a CPU."""

import math

import pytest
import torch
from helpers.workspace import params_with

from minigpt.data import dataset, encode
from minigpt.errors import UserError
from minigpt.runtime.distributed import ProcessGroup
from minigpt.training.checkpoint import Checkpoints, TrainState
from minigpt.training.scaling import GROWTH_STEPS, MAX_SCALE, LossScale
from minigpt.training.trainer import Trainer


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)
    return dataset.load_corpus(tmp_path)


def make_trainer(corpus, folder, **train):
    params = params_with(train={"dtype": "float16", "sample_chars": 0, "max_iters": 40, "eval_interval": 20} | train)
    return Trainer(params, corpus, ProcessGroup(0, 1, torch.device("cpu")), None, Checkpoints(folder, "half"))


def test_training_in_float16_is_as_good_as_in_float32(corpus, tmp_path):
    half = make_trainer(corpus, tmp_path / "half").run().history
    full = make_trainer(corpus, tmp_path / "full", dtype="float32").run().history
    assert half[-1]["val_loss"] < half[0]["val_loss"] - 0.5
    assert half[-1]["val_loss"] == pytest.approx(full[-1]["val_loss"], abs=0.02)


def test_step_that_overflows_changes_no_weight_and_halves_the_factor(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    trainer.state.loss_scale = 2.0**40
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    loss, norm, _ = trainer.train_step(0).tolist()
    assert (math.isfinite(loss), norm) == (True, 0)
    assert trainer.state.loss_scale == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    for step in range(1, 30):
        trainer.train_step(step)
    assert 1 < trainer.state.loss_scale < 2.0**39
    assert not all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_factor_that_cannot_shrink_reports_the_divergence(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    trainer.state.loss_scale = 1.0
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="training diverged"):
        trainer.run()


def test_factor_doubles_after_many_good_steps_up_to_a_limit():
    state = TrainState(loss_scale=MAX_SCALE / 2)
    scale = LossScale(state)
    for _ in range(2 * GROWTH_STEPS - 1):
        assert scale.update(True)
    assert (state.loss_scale, state.good_steps) == (MAX_SCALE, GROWTH_STEPS - 1)
    scale.update(True)
    assert state.loss_scale == MAX_SCALE
    state.loss_scale = 1.0
    assert not scale.update(False)
