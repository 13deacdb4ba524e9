import hashlib
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data import dataset, encode
from minigpt.data.dataset import Corpus, Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import Interrupted, UserError
from minigpt.evaluation.loss import score
from minigpt.model import GPT
from minigpt.runtime.distributed import ProcessGroup
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.optimizer import Optimizers
from minigpt.training.trainer import Trainer

SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))


class Notes:
    """An observer that remembers, and may act at a step."""

    def __init__(self, act=None):
        self.values, self.act = {}, act

    def metrics(self, step, values):
        self.values.setdefault(step, {}).update(values)
        if self.act:
            self.act(step)

    def mirror(self):
        pass


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(folder / "a.txt", 0.1, folder)
    return dataset.load_corpus(folder)


def trainer(text, folder, act=None, model=None, **train):
    params = params_with(model={"dropout": 0.2, **(model or {})}, train=train)
    return Trainer(params, text, SINGLE_PROCESS, Notes(act), Checkpoints(folder, "f00d"))


def digest(weights):
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


VARIANTS = [
    {},
    {"optimizer": "adamw", "learning_rate": 1e-2, "grad_accum": 2, "grad_clip": 0.1},
    {"dtype": "bfloat16", "model": {"dropout_kind": "element", "tied_head": True}},
    {"model": {"activation": "swiglu", "mlp_ratio": 2.5}},
]


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_two_trainings_are_bitwise_equal_and_another_seed_is_not(text, tmp_path, how):
    first, second = (trainer(text, tmp_path / name, **how).run() for name in "ab")
    assert digest(first.weights) == digest(second.weights)
    assert first.history == second.history
    assert digest(trainer(text, tmp_path / "c", **{**how, "seed": 1}).run().weights) != digest(first.weights)


@pytest.mark.parametrize("how", VARIANTS, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 7, 11])
def test_an_interrupted_training_goes_on_bitwise(text, tmp_path, how, stop):
    whole = trainer(text, tmp_path / "whole", **how).run()

    def interrupt(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    halted = trainer(text, tmp_path / "halted", interrupt, eval_interval=5, **how)
    with pytest.raises(Interrupted) as stopped:
        halted.run()
    assert stopped.value.signum == signal.SIGTERM
    assert halted.facts["step"] <= stop + 1
    resumed = trainer(text, tmp_path / "halted", **how)
    outcome = resumed.run()
    assert resumed.facts["resumed_at"] == [halted.facts["step"]]
    assert digest(outcome.weights) == digest(whole.weights)
    assert outcome.history == whole.history


def test_how_often_is_evaluated_changes_no_weight(text, tmp_path):
    often, rarely = (trainer(text, tmp_path / str(n), eval_interval=n) for n in (1, 12))
    often.run()
    rarely.run()
    assert digest(often.model.state_dict()) == digest(rarely.model.state_dict())


def test_accumulated_parts_give_the_gradient_of_the_whole(text, tmp_path):
    def after(parts):
        one = trainer(
            text,
            tmp_path,
            model={"dropout": 0.0},
            token_noise=0.0,
            grad_accum=parts,
            epsilon=1e-3,
            optimizer="adamw",
            dtype="float32",
        )
        one.optimizers = Optimizers(one.model.double(), one.train, torch.float64)
        loss_and_norm = one._step(0)
        return torch.cat([p.flatten() for p in one.model.parameters()]), loss_and_norm

    (one, first), (four, second) = after(1), after(4)
    torch.testing.assert_close(one, four, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(first, second)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_gradient(text, tmp_path):
    gradients = []
    for how in ("never", "always"):
        one = trainer(text, tmp_path, model={"dropout": 0.0, "attention_window": 5}, compile=how, dtype="float32")
        for p in one.model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        if one.compiled:
            one._compile(3)
            assert one.logits is not one.parallel
            assert all(p.grad is None for p in one.model.parameters())
        one._gradient(3)
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_where_nothing_compiles_it_is_told(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    torch._dynamo.reset()
    one = trainer(text, tmp_path, compile="always")
    with pytest.raises(UserError, match=r"train\.compile: torch\.compile fails here: .*no-compiler.*auto or never"):
        one.run()


def test_compiling_is_chosen_by_device_and_length(text, tmp_path):
    chosen = {
        how: trainer(text, tmp_path, compile=how, max_iters=10**6).compiled for how in ("auto", "always", "never")
    }
    assert chosen == {"auto": False, "always": True, "never": False}


def test_the_best_weights_are_the_outcome_and_patience_stops(text, tmp_path):
    one = trainer(text, tmp_path, max_iters=400, learning_rate=0.3, eval_interval=4, patience=3, schedule="constant")
    outcome = one.run()
    losses = [row["val_loss"] for row in outcome.history]
    assert outcome.metrics["steps"] < 400
    assert losses.index(min(losses)) == len(losses) - 4
    best = GPT(one.model.config, text.tokenizer.vocab_size)
    best.load_state_dict(outcome.weights)
    assert score(best, text.val).loss == pytest.approx(min(losses), abs=2e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(text, tmp_path):
    one = trainer(text, tmp_path, max_iters=9)
    step, kept = one._step, {}

    def poisoned(number, wish):
        if number == 6:
            kept["weights"] = digest(one.model.state_dict())
            one.model.head.weight.register_hook(lambda grad: grad * math.nan)
        return step(number, wish)

    one._step = poisoned
    with pytest.raises(UserError, match=r"diverged: at step 6 .* last good checkpoint is of step 0"):
        one.run()
    assert digest(one.model.state_dict()) == kept["weights"]


def test_a_corpus_shorter_than_the_context_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"too few for model\.block_size = 5000"):
        trainer(text, tmp_path, model={"block_size": 5000})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_trains_what_a_cpu_does(tmp_path, optimizer):
    text = "the quick brown fox jumps over the lazy dog.\n" * 100
    (tmp_path / "a.txt").write_text(text)
    encode.encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)
    losses = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        params = params_with(
            model={"dropout": 0.0},
            train={"dtype": "float32", "token_noise": 0.0, "device": name, "optimizer": optimizer},
        )
        there = dataset.load_corpus(tmp_path, device)
        one = Trainer(params, there, ProcessGroup(0, 1, device), None, Checkpoints(tmp_path / name, "f00d"))
        torch.set_float32_matmul_precision("highest")  # Muon makes much of what TF32 rounds
        losses.append([row["val_loss"] for row in one.run().history])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_metrics_tell_what_was_done(text, tmp_path):
    one = trainer(text, tmp_path)
    outcome = one.run()
    assert [row["step"] for row in outcome.history] == [0, 5, 10, 12]
    assert outcome.history[0]["val_loss"] == pytest.approx(math.log(text.tokenizer.vocab_size), rel=1e-3)
    assert outcome.metrics["steps"] == 12
    told = one.observer.values
    assert {"train_loss", "val_loss", "batch_loss", "learning_rate", "grad_norm", "chars_per_second"} <= {
        name for values in told.values() for name in values
    }


def test_a_markov_source_is_learnt_to_its_entropy_and_never_below_it(tmp_path):
    """The true model's loss on the very text that is scored is the floor; below it would mean leakage."""
    V, order, n = 8, 2, 400_000
    rng = np.random.default_rng(0)
    table = rng.dirichlet([0.5] * V, size=(V,) * order)
    ids, draws, cumulative = np.zeros(n, dtype=np.uint8), rng.random(n), table.cumsum(-1)
    for t in range(order, n):
        ids[t] = min(V - 1, np.searchsorted(cumulative[ids[t - 2], ids[t - 1]], draws[t]))
    cut = n * 9 // 10
    source = Corpus(*(Split(torch.from_numpy(part)) for part in (ids[:cut], ids[cut:])), Tokenizer("abcdefgh"), "")
    one = trainer(
        source, tmp_path, model={"n_embd": 64, "block_size": 32, "n_head": 2, "head_size": 16, "dropout": 0.0},
        max_iters=500, batch_size=64, token_noise=0.0, eval_interval=250, eval_chars=10**6, dtype="float32",
    )  # fmt: skip
    one.run()
    val = ids[cut:].astype(np.int64)
    truth = -np.log(table[val[:-2], val[1:-1], val[2:]])
    # Windows every 8 characters: but for the very first, each target has 24 characters before it.
    model_loss = score(one.model, source.val, stride=8).loss
    excess = model_loss - truth.mean()
    sampling_error = 4 * truth.std() / math.sqrt(len(truth))
    print(f"model {model_loss:.4f}, true model {truth.mean():.4f}, excess {excess:.4f} nats")
    assert -sampling_error < excess < 0.02
