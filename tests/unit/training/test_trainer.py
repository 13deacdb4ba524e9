import hashlib
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.workspace import params_with
from safetensors.torch import load_file

from minigpt.data import dataset, encode
from minigpt.data.dataset import Corpus, Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import Interrupted, UserError
from minigpt.evaluation.loss import score
from minigpt.export import export
from minigpt.model import GPT
from minigpt.runtime.distributed import ProcessGroup
from minigpt.training.checkpoint import Checkpoints
from minigpt.training.control import Control, DeferredScalars
from minigpt.training.optimizer import Optimizers
from minigpt.training.trainer import COMPILE_STEPS, Trainer, TrainState, overfitting_since, should_compile

SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))


class RecordingObserver:
    """Observer that keeps all values and may call a function of the step."""

    def __init__(self, on_metrics=None):
        self.values, self.on_metrics = {}, on_metrics

    def metrics(self, step, values):
        self.values.setdefault(step, {}).update(values)
        if self.on_metrics:
            self.on_metrics(step)

    def history(self, rows):
        """The result has them too."""

    def samples(self, rows):
        self.rows = [dict(row) for row in rows]

    def upload(self):
        pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(folder / "a.txt", 0.1, folder)
    return dataset.load_corpus(folder)


def make_trainer(corpus, folder, on_metrics=None, model=None, **train):
    params = params_with(model={"dropout": 0.2, **(model or {})}, train=train)
    return Trainer(params, corpus, SINGLE_PROCESS, RecordingObserver(on_metrics), Checkpoints(folder, "f00d"))


def digest(weights):
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


VARIANTS = [
    {},
    {"optimizer": "adamw", "learning_rate": 1e-2, "grad_accum": 2, "grad_clip": 0.1},
    {"dtype": "bfloat16", "model": {"dropout_kind": "element", "tied_head": True}},
    {"model": {"activation": "swiglu", "mlp_ratio": 2.5}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training_is_bitwise_deterministic_and_depends_on_the_seed(corpus, tmp_path, variant):
    first, second = (make_trainer(corpus, tmp_path / name, **variant).run() for name in "ab")
    assert digest(first.weights) == digest(second.weights)
    assert first.history == second.history
    other = make_trainer(corpus, tmp_path / "c", **{**variant, "seed": 1}).run()
    assert digest(other.weights) != digest(first.weights)


@pytest.mark.parametrize("variant, stop", [*zip(VARIANTS, (1, 5, 7, 11), strict=True), (VARIANTS[1], 5)], ids=str)
def test_resume_is_bitwise_identical(corpus, tmp_path, variant, stop):
    uninterrupted = make_trainer(corpus, tmp_path / "uninterrupted", **variant).run()

    def interrupt(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = make_trainer(corpus, tmp_path / "stopped", interrupt, eval_interval=5, **variant)
    with pytest.raises(Interrupted) as interrupted:
        stopped.run()
    assert interrupted.value.signum == signal.SIGTERM
    assert stopped.state.step <= stop + 1
    assert stopped.state.saved_step == stopped.state.step
    resumed = make_trainer(corpus, tmp_path / "stopped", **variant)
    result = resumed.run()
    assert resumed.state.resumed_at == [stopped.state.step]
    assert digest(result.weights) == digest(uninterrupted.weights)
    assert result.history == uninterrupted.history
    assert result.samples == uninterrupted.samples


def test_public_steps_do_what_run_does(corpus, tmp_path):
    by_run, by_hand = (make_trainer(corpus, tmp_path / name) for name in ("run", "hand"))
    result = by_run.run()
    for step in range(13):
        if step % 5 == 0 or step == 12:
            by_hand.evaluate(step)
        if step < 12:
            _, by_hand.state.grad_norm, _ = by_hand.train_step(step).tolist()
            by_hand.state.step = step + 1
    by_hand.save_checkpoint()
    assert by_hand.state.history == result.history
    folder = by_hand.checkpoints.folder / "step-000012"
    assert TrainState(**json.loads((folder / "state.json").read_text())) == by_hand.state
    saved = load_file(folder / "state.safetensors")
    assert digest({name: saved[f"best.{name}"] for name in result.weights}) == digest(result.weights)


def test_evaluation_interval_does_not_affect_weights(corpus, tmp_path):
    often, rarely = (make_trainer(corpus, tmp_path / str(n), eval_interval=n) for n in (1, 12))
    often.run()
    rarely.run()
    assert digest(often.model.state_dict()) == digest(rarely.model.state_dict())


def test_gradient_accumulation_equals_the_whole_batch(corpus, tmp_path):
    def after_one_step(grad_accum):
        trainer = make_trainer(
            corpus, tmp_path, model={"dropout": 0.0}, token_noise=0.0, grad_accum=grad_accum, epsilon=1e-3,
            optimizer="adamw", dtype="float32",
        )  # fmt: skip
        trainer.optimizers = Optimizers(trainer.model.double(), trainer.train, torch.float64)
        scalars = trainer.train_step(0)
        return torch.cat([p.flatten() for p in trainer.model.parameters()]), scalars

    (weights_1, scalars_1), (weights_4, scalars_4) = after_one_step(1), after_one_step(4)
    torch.testing.assert_close(weights_1, weights_4, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scalars_1, scalars_4)


def test_temperature_divides_the_logits_of_the_loss(corpus, tmp_path):
    def first_gradient(temperature, head_scale):
        model = {"dropout": 0.0, "tied_head": False}
        trainer = make_trainer(corpus, tmp_path, model=model, temperature=temperature, dtype="float32")
        torch.nn.init.normal_(trainer.model.head.weight)
        with torch.no_grad():
            trainer.model.head.weight.mul_(head_scale)
        loss = trainer.accumulate_gradient(0)
        return loss, trainer.model.embedding.weight.grad, trainer.model.head.weight.grad * head_scale

    torch.testing.assert_close(first_gradient(0.5, 1.0), first_gradient(1.0, 2.0))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_has_the_same_gradient(corpus, tmp_path):
    gradients = []
    for setting in ("never", "always"):
        model = {"dropout": 0.0, "attention_window": 5}
        trainer = make_trainer(corpus, tmp_path, model=model, compile=setting, dtype="float32")
        assert trainer.compiled == (setting == "always")
        for p in trainer.model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        if trainer.compiled:
            trainer.compile_model(3)
            assert trainer.logits is not trainer.parallel
            assert all(p.grad is None for p in trainer.model.parameters())
        trainer.accumulate_gradient(3)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_missing_compiler_is_reported(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch._dynamo.reset()
    trainer = make_trainer(corpus, tmp_path, compile="always")
    without_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with (
        without_compiler,
        pytest.raises(UserError, match=r"train\.compile: torch\.compile failed: .*no-compiler.*auto or never"),
    ):
        trainer.run()


@pytest.mark.parametrize(
    "setting, device, steps, expected",
    [
        ("auto", "cuda", COMPILE_STEPS, True),
        ("auto", "cuda", COMPILE_STEPS - 1, False),
        ("auto", "cpu", 10**6, False),
        ("always", "cpu", 1, True),
        ("never", "cuda", 10**6, False),
    ],
)
def test_compilation_depends_on_setting_device_and_steps(setting, device, steps, expected):
    assert should_compile(setting, torch.device(device), steps) == expected


def test_result_has_the_best_weights_and_patience_stops_training(corpus, tmp_path):
    trainer = make_trainer(
        corpus, tmp_path, max_iters=400, learning_rate=0.3, eval_interval=4, patience=3, schedule="constant"
    )
    result = trainer.run()
    losses = [row["val_loss"] for row in result.history]
    assert result.metrics["steps"] < 400
    assert losses.index(min(losses)) == len(losses) - 4
    best = GPT(trainer.model.config, corpus.tokenizer.vocab_size)
    best.load_state_dict(result.weights)
    assert score(best, corpus.val).loss == pytest.approx(min(losses), abs=2e-3)


HISTORIES = [
    ([(3, 3)], None),
    ([(3, 3), (2, 2.5), (1, 2.6)], None),  # one evaluation may be chance
    ([(3, 3), (2, 2.5), (1, 2.6), (0.5, 2.7)], 10),
    ([(3, 3), (2, 2.5), (2.1, 2.6), (0.5, 2.7)], None),  # the training loss rose, too
    ([(3, 3), (2, 2.5), (1, 2.6), (0.5, 2.7), (0.4, 2.4)], None),
]


@pytest.mark.parametrize("losses, step", HISTORIES)
def test_overfitting_is_a_rising_validation_loss_with_a_falling_training_loss(losses, step):
    history = [{"step": 10 * n, "train_loss": train, "val_loss": val} for n, (train, val) in enumerate(losses)]
    assert overfitting_since(history) == step


def test_overfitting_is_reported_once(tmp_path, capsys):
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 600)
    (tmp_path / "noise.txt").write_text("".join(letters))
    encode.encode_corpus(tmp_path / "noise.txt", 0.2, tmp_path)
    model, train = {"dropout": 0.0}, {"max_iters": 100, "eval_interval": 10, "learning_rate": 0.1, "patience": 4}
    result = make_trainer(dataset.load_corpus(tmp_path), tmp_path, model=model, **train).run()
    since = result.metrics["overfitting_since"]
    printed = capsys.readouterr().out
    assert printed.count(f"overfitting since step {since}:") == printed.count("overfitting") == 1
    assert "stopping early: no better loss in 4 evaluations" in printed
    assert result.metrics["steps"] == since + 40


def test_divergence_stops_training_before_it_changes_the_weights(corpus, tmp_path):
    class Diverging(Trainer):
        def train_step(self, step, request=0):
            if step == 6:
                self.last_good = digest(self.model.state_dict())
                self.model.head.weight.register_hook(lambda grad: grad * math.nan)
            return super().train_step(step, request)

    params = params_with(train={"max_iters": 9})
    trainer = Diverging(params, corpus, SINGLE_PROCESS, None, Checkpoints(tmp_path, "f00d"))
    with pytest.raises(UserError, match=r"diverged: at step 6 .* last good checkpoint is of step 0"):
        trainer.run()
    assert digest(trainer.model.state_dict()) == trainer.last_good


class LateScalars:
    """Scalars that are read one step late, as on a GPU."""

    pending = None

    def push(self, step, values):
        previous = self.pop()
        self.pending = step, values.tolist()
        return previous

    def pop(self):
        pending, self.pending = self.pending, None
        return pending


class JointControl(Control):
    """Control that decides as with several processes, by the sum of their requests."""

    def decide(self, step, total):
        super().decide(step, total)
        return total


@pytest.mark.parametrize("eval_interval", [1, 2, 12])
def test_signal_stops_several_processes_on_gpus_within_three_steps(corpus, tmp_path, monkeypatch, eval_interval):
    monkeypatch.setattr("minigpt.training.trainer.DeferredScalars", LateScalars)
    monkeypatch.setattr("minigpt.training.trainer.Control", JointControl)

    class Killed(Trainer):
        def train_step(self, step, request):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(step, request)

    params = params_with(train={"eval_interval": eval_interval})
    trainer = Killed(params, corpus, SINGLE_PROCESS, None, Checkpoints(tmp_path, "f00d"))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        trainer.run()
    assert trainer.state.step <= 7


def test_corpus_shorter_than_the_context_is_rejected(corpus, tmp_path):
    with pytest.raises(UserError, match=r"too few for model\.block_size = 5000"):
        make_trainer(corpus, tmp_path, model={"block_size": 5000})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gpu_trains_like_cpu(tmp_path, optimizer):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)
    losses = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        params = params_with(
            model={"dropout": 0.0},
            train={"dtype": "float32", "token_noise": 0.0, "device": name, "optimizer": optimizer},
        )
        group = ProcessGroup(0, 1, device)
        trainer = Trainer(
            params, dataset.load_corpus(tmp_path, device), group, None, Checkpoints(tmp_path / name, "f00d")
        )
        torch.set_float32_matmul_precision("highest")  # Muon amplifies the rounding errors of TF32
        losses.append([row["val_loss"] for row in trainer.run().history])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_metrics_describe_the_training(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path)
    result = trainer.run()
    assert [row["step"] for row in result.history] == [0, 5, 10, 12]
    assert result.history[0]["val_loss"] == pytest.approx(math.log(corpus.tokenizer.vocab_size), rel=1e-3)
    assert result.metrics["steps"] == 12
    assert {name for values in trainer.observer.values.values() for name in values} == {
        "train_loss", "val_loss", "batch_loss", "learning_rate", "grad_norm", "chars_per_second"
    }  # fmt: skip


def test_losses_that_are_read_a_step_later_have_the_same_steps(corpus, tmp_path, monkeypatch):
    """On a GPU, the loss of a step is read during the next one. Here a CPU does the same."""

    def push(scalars, step, values):
        previous, scalars.stored = scalars.pop(), (step, values.tolist())
        return previous

    def pop(scalars):
        stored, scalars.stored = getattr(scalars, "stored", None), None
        return stored

    expected = make_trainer(corpus, tmp_path / "now", max_iters=20, eval_interval=20).run().batches
    monkeypatch.setattr(DeferredScalars, "push", push)
    monkeypatch.setattr(DeferredScalars, "pop", pop)
    assert make_trainer(corpus, tmp_path / "later", max_iters=20, eval_interval=20).run().batches == expected
    assert [row["step"] for row in expected] == list(range(2, 21, 2))


def test_learning_rate_of_an_evaluation_is_that_of_its_metrics(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, schedule="constant", warmup_iters=0, learning_rate=0.02)
    assert {row["learning_rate"] for row in trainer.run().history} == {0.02}
    assert {values.get("learning_rate", 0.02) for values in trainer.observer.values.values()} == {0.02}


@pytest.mark.slow
def test_loss_on_a_markov_source_reaches_its_entropy_and_not_less(tmp_path):
    """The true model's loss on the scored text is the floor; a lower loss would mean leakage."""
    V, order, n = 8, 2, 400_000
    rng = np.random.default_rng(0)
    table = rng.dirichlet([0.5] * V, size=(V,) * order)
    ids, draws, cumulative = np.zeros(n, dtype=np.uint8), rng.random(n), table.cumsum(-1)
    for t in range(order, n):
        ids[t] = min(V - 1, np.searchsorted(cumulative[ids[t - 2], ids[t - 1]], draws[t]))
    cut = n * 9 // 10
    source = Corpus(*(Split(torch.from_numpy(part)) for part in (ids[:cut], ids[cut:])), Tokenizer("abcdefgh"), "")
    trainer = make_trainer(
        source, tmp_path, model={"n_embd": 64, "block_size": 32, "n_head": 2, "head_size": 16, "dropout": 0.0},
        max_iters=500, batch_size=64, token_noise=0.0, eval_interval=250, eval_chars=10**6, dtype="float32",
    )  # fmt: skip
    trainer.run()
    val = ids[cut:].astype(np.int64)
    truth = -np.log(table[val[:-2], val[1:-1], val[2:]])
    # With windows every 8 characters, each target after the first window has 24 characters of context.
    model_loss = score(trainer.model, source.val, stride=8).loss
    excess = model_loss - truth.mean()
    sampling_error = 4 * truth.std() / math.sqrt(len(truth))
    print(f"model {model_loss:.4f}, true model {truth.mean():.4f}, excess {excess:.4f} nats")
    assert -sampling_error < excess < 0.02


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_samples_do_not_change_a_training(corpus, tmp_path, variant):
    silent = make_trainer(corpus, tmp_path / "silent", **variant, sample_chars=0).run()
    sampled = make_trainer(corpus, tmp_path / "sampled", **variant, sample_chars=30, sample_interval=1).run()
    assert digest(sampled.weights) == digest(silent.weights)
    assert sampled.history == silent.history
    assert silent.samples == []
    assert [row["step"] for row in sampled.samples] == list(range(13))


def test_a_sample_is_written_at_each_evaluation_and_recorded_as_it_comes(corpus, tmp_path, capsys):
    rows = {}

    def keep(step):
        rows[step] = list(getattr(trainer.observer, "rows", []))

    trainer = make_trainer(corpus, tmp_path, keep, eval_interval=5, sample_chars=30)
    result = trainer.run()
    assert [row["step"] for row in result.samples] == [row["step"] for row in result.history] == [0, 5, 10, 12]
    assert [row["prompt"] for row in result.samples] == ["\n"] * 4
    assert all(len(row["text"]) == 30 for row in result.samples)
    assert len({row["text"] for row in result.samples}) > 1
    assert rows[10] == result.samples[:2]  # when the losses of step 10 are recorded, its sample is not yet written
    assert trainer.observer.rows == result.samples
    printed = capsys.readouterr().out
    assert printed.index("step      5") < printed.index(f"  | {result.samples[1]['text'][:5].rstrip()}".rstrip())


def test_training_starts_from_an_exported_model(corpus, tmp_path):
    first = make_trainer(corpus, tmp_path / "first", max_iters=5)
    result = first.run()
    export(tmp_path / "base", first.model.config, result.weights, corpus.tokenizer)
    second = make_trainer(corpus, tmp_path / "second", max_iters=1, init_from=str(tmp_path / "base")).run()
    assert second.history[0]["val_loss"] == result.history[-1]["val_loss"]


def test_samples_have_their_own_interval(corpus, tmp_path):
    result = make_trainer(corpus, tmp_path, eval_interval=5, sample_interval=8, sample_chars=3).run()
    assert [row["step"] for row in result.samples] == [0, 8, 12]
