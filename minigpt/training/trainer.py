"""The training loop: a pure function of params and corpus, whatever interrupts it."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt.data.dataset import Corpus, Split, check_context
from minigpt.errors import Interrupted, UserError
from minigpt.evaluation.loss import cross_entropy, score
from minigpt.model import GPT
from minigpt.params import Params
from minigpt.runtime.device import compute_dtype
from minigpt.runtime.distributed import ProcessGroup, full_tensor, to_local
from minigpt.training.checkpoint import Checkpoints, State
from minigpt.training.control import NOTHING, SAVE, STOP, CheckpointTimer, DeferredScalars, Signals, Stopwatch
from minigpt.training.optimizer import Optimizers, learning_rate

COMPILE_STEPS = 2000
"""From this many steps on, compiling for a GPU is taken to pay for the minute that it takes."""

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s of GPUs, by a part of their name (NVIDIA's data sheets; SXM forms)."""

TRAIN_SAMPLE = 1 << 15
"""Characters of the training split that an evaluation scores beside the validation split."""

HISTORY = ("step", "train_loss", "val_loss", "learning_rate", "grad_norm")
"""Columns of the history: losses in nats per character, learning rate as a share of its peak."""


class Observer(Protocol):
    """Whoever is told of a training's course."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Values at a step; called again for the same steps when a training is resumed."""

    def mirror(self) -> None:
        """Keep what was told, and pass it on: the training's clock stands still."""


@dataclass
class TrainResult:
    """What a training comes to.

    Attributes:
        weights: of the step with the least validation loss.
        history: a row for each evaluation, with the columns of HISTORY.
        metrics: the outcome in numbers.
    """

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    metrics: dict[str, float]


def micro_seed(seed: int, step: int, micro: int) -> int:
    """The seed of everything random inside one micro-batch: dropout and replaced characters."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {micro}".encode(), digest_size=7).digest(), "big")


def replace_random_tokens(ids: Tensor, share: float, vocab_size: int) -> Tensor:
    """``ids`` with a share of them replaced by random characters."""
    replaced = torch.rand(ids.shape, device=ids.device) < share
    return torch.where(replaced, torch.randint_like(ids, vocab_size), ids)


class Trainer:
    """One training.

    Args:
        params: all of params.yaml; ``model`` and ``train`` decide.
        corpus: on the device of ``ranks``.
        group: this process among those of the job.
        observer: is told of every metric; None in all processes but the first.
        checkpoints: where the state is kept; the caller holds their lock.
    """

    def __init__(
        self, params: Params, corpus: Corpus, group: ProcessGroup, observer: Observer | None, checkpoints: Checkpoints
    ) -> None:
        check_context(corpus, params.model.block_size)
        self.train, self.block_size = params.train, params.model.block_size
        self.corpus, self.group, self.observer, self.checkpoints = corpus, group, observer, checkpoints
        torch.manual_seed(self.train.seed)
        if group.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if self.train.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
        dtype = compute_dtype(self.train.dtype, group.device)
        self.model = GPT(params.model, corpus.tokenizer.vocab_size)
        self.model.compute_dtype = dtype
        self.model.checkpointing = self.train.activation_checkpointing
        self.parallel = group.wrap(self.model)
        how = self.train.compile
        self.compiled = how == "always" or (
            how == "auto" and group.device.type == "cuda" and self.train.max_iters >= COMPILE_STEPS
        )
        self.logits: Callable[[Tensor], Tensor] = self.parallel
        self.optimizers = Optimizers(self.model, self.train, dtype or torch.float32)
        self.found_inf = torch.zeros((), device=group.device)
        self.best: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {
            "step": 0, "best_step": 0, "best_loss": math.inf, "since_best": 0, "grad_norm": 0.0,
            "train_seconds": 0.0, "resumed_at": [], "history": [],
        }  # fmt: skip

    def run(self) -> TrainResult:
        """Train to the end, from the newest checkpoint where there is one.

        Raises:
            Interrupted: a signal came; the state was saved.
            UserError: the loss or the gradient is no longer finite; the weights on disk are.
        """
        self._resume()
        train, facts, late = self.train, self.facts, DeferredScalars()
        log_interval = max(1, train.eval_interval // 10)
        due = CheckpointTimer(facts["step"])
        clock = self.clock = Stopwatch(facts["train_seconds"])
        logged_at = clock.seconds
        losses: list[float] = []
        wish = NOTHING
        with Signals() as signals, self._bar() as bar:
            if self.compiled and facts["step"] < train.max_iters:
                with clock.paused():
                    self._compile(facts["step"])
            # One round more than there are steps: the last only evaluates.
            for step in range(facts["step"], train.max_iters + 1):
                last = step == train.max_iters
                if step % train.eval_interval == 0 or last:
                    self._read(late.exchange(step, None), losses)
                    with clock.paused():
                        self._evaluate(step, bar)
                if last or (train.patience and facts["since_best"] >= train.patience):
                    break
                agreed = self._read(late.exchange(step, self._step(step, wish)), losses)
                facts["step"] = step + 1
                bar.update()
                if len(losses) >= log_interval:
                    self._log(step + 1, losses, clock.seconds - logged_at, bar)
                    logged_at = clock.seconds
                    losses.clear()
                wish = STOP if signals.first() else SAVE if self.group.is_main and due.at(step + 1) else NOTHING
                if self.group.world_size == 1:
                    agreed = wish
                if agreed:
                    agreed = max(agreed, self._read(late.exchange(step, None), losses))
                    with clock.paused():
                        self._save()
                    due, wish = CheckpointTimer(step + 1), NOTHING
                if agreed >= STOP:
                    signum = self.group.all_reduce_max(signals.first())
                    why = "DVC has ended" if signum == signal.SIGHUP else f"stopped by {signal.Signals(signum).name}"
                    raise Interrupted(signum, f"{why}; saved after step {step + 1}: run the same again, and it goes on")
        weights = {name: full_tensor(value) for name, value in self.best.items()}
        return TrainResult(weights, facts["history"], self._metrics())

    def describe(self) -> str:
        """The training in one line, for people."""
        train, device = self.train, self.group.device
        where = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        dtype = str(self.model.compute_dtype or torch.float32).removeprefix("torch.")
        return (
            f"{self.model.num_parameters():,} parameters in {dtype} on {where}; "
            f"{train.max_iters:,} steps of {train.batch_size} x {self.block_size} characters"
            + (", compiled" if self.compiled else "")
            + (f", in {self.group.world_size} processes" if self.group.world_size > 1 else "")
        )

    def _compile(self, step: int) -> None:
        """Compile the model for training, on the batch of ``step``; no weight changes.

        Raises:
            UserError: it does not compile here, and ``train.compile`` insists.
        """
        from torch._dynamo.exc import TorchDynamoException

        self.logits = torch.compile(self.parallel)
        try:
            self._gradient(step)
        except TorchDynamoException as error:
            why = f"torch.compile fails here: {str(error).strip().splitlines()[0]}"
            if self.train.compile == "always":
                raise UserError(f"train.compile: {why}; set it to auto or never") from None
            if self.group.is_main:
                tqdm.write(f"minigpt: {why}; goes on without")
            self.logits, self.compiled = self.parallel, False
        self.model.zero_grad(set_to_none=True)

    def _gradient(self, step: int) -> Tensor:
        """Add up the gradient of a step's batch; gives this process's share of the loss."""
        train = self.train
        mine = self.group.micro_batches(train.grad_accum)
        windows = train.batch_size // train.grad_accum
        total = torch.zeros((), device=self.group.device)
        for micro in mine:
            first = step * train.batch_size + micro * windows
            ids, targets = self.corpus.train.batch(
                train.seed, first, windows, self.block_size, prefetch_stride=self.group.world_size * windows
            )
            torch.manual_seed(micro_seed(train.seed, step, micro))
            if train.token_noise:
                ids = replace_random_tokens(ids, train.token_noise, self.model.vocab_size)
            with self.group.no_sync(self.parallel, micro != mine[-1]):
                loss = cross_entropy(self.logits(ids), targets)
                (loss / len(mine)).backward()
            total += loss.detach() / train.grad_accum
        return total

    def _step(self, step: int, wish: int = NOTHING) -> Tensor:
        """One optimizer step; gives (loss, norm of the gradient, sum of the processes' wishes), read later."""
        total = self._gradient(step)
        total, wishes = self.group.all_reduce_sum(torch.stack((total, torch.full_like(total, wish)))).unbind()
        grads = [to_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = self.group.grad_norm(grads)
        if self.train.grad_clip:
            torch._foreach_mul_(grads, (self.train.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        finite = torch.isfinite(total + norm)
        if finite.is_cuda:
            # Once set it stays set: no later step may touch the weights before the host has seen it.
            self.found_inf = torch.maximum(self.found_inf, (~finite).float())
            self.optimizers.step(step, self.found_inf)
        elif finite:
            self.optimizers.step(step)
        self.model.zero_grad(set_to_none=True)
        return torch.stack((total, norm, wishes))

    def _read(self, arrived: tuple[int, list[float]] | None, losses: list[float]) -> int:
        """Take in what a step gave, and stop where it is not finite; gives the sum of the processes' wishes."""
        if arrived is None:
            return NOTHING
        step, (loss, norm, wishes) = arrived
        if not math.isfinite(loss + norm):
            kept = self.facts.get("saved_step", 0)
            raise UserError(
                f"training diverged: at step {step} the loss is {loss:.4g} and the gradient's norm {norm:.4g}, "
                f"at {learning_rate(step, self.train):.3g} of the peak learning rate {self.train.learning_rate:g}; "
                f"the last good checkpoint is of step {kept}. Try a smaller train.learning_rate or train.grad_clip: 1"
            )
        losses.append(loss)
        self.facts["grad_norm"] = norm
        return int(wishes)

    def _evaluate(self, step: int, bar: tqdm[Any]) -> None:
        """Score both splits; keep the weights if they are the best so far."""
        facts, train = self.facts, self.train
        if facts["history"] and facts["history"][-1]["step"] >= step:
            return
        train_loss = self._score(self.corpus.train, min(TRAIN_SAMPLE, train.eval_chars))
        val_loss = self._score(self.corpus.val, train.eval_chars)
        values = (step, train_loss, val_loss, learning_rate(step, train), facts["grad_norm"])
        facts["history"].append(dict(zip(HISTORY, values, strict=True)))
        if self.observer:
            self.observer.metrics(step, {"train_loss": train_loss, "val_loss": val_loss})
            self.observer.mirror()
        facts["since_best"] += 1
        better = val_loss < facts["best_loss"] or not self.best
        if better:
            facts |= {"best_loss": val_loss, "best_step": step, "since_best": 0}
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.group.is_main:
            bar.write(
                f"step {step:6,d}   train {train_loss:.4f}   validation {val_loss:.4f}{'   best' if better else ''}"
            )

    def _score(self, split: Split, max_chars: int) -> float:
        return score(self.model, split, max_chars=max_chars, group=self.group).loss

    def _log(self, step: int, losses: list[float], seconds: float, bar: tqdm[Any]) -> None:
        """Tell of the steps since the last time; ``seconds`` is how long they took."""
        loss = sum(losses) / len(losses)
        speed = len(losses) * self.train.batch_size * self.block_size / max(seconds, 1e-9)
        values = {
            "batch_loss": loss,
            "learning_rate": self.train.learning_rate * learning_rate(step - 1, self.train),
            "grad_norm": self.facts["grad_norm"],
            "chars_per_second": speed,
        }
        if self.observer:
            self.observer.metrics(step, values)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} characters/s", refresh=False)

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.train.max_iters,
            initial=self.facts["step"],
            unit="step",
            disable=None if self.group.is_main else True,
        )

    def _save(self) -> None:
        self.facts |= {"saved_step": self.facts["step"], "train_seconds": self.clock.seconds}
        if self.observer:
            self.observer.mirror()  # what was told must not be younger on the disk than the state
        self.checkpoints.save(State(self._tensors(), self.facts), self.group)

    def _tensors(self) -> dict[str, Tensor]:
        """The state's tensors: weights, best weights, optimizers."""
        weights = self.model.state_dict()
        tensors = {f"weights.{name}": value for name, value in weights.items()}
        tensors |= {f"best.{name}": value for name, value in (self.best or weights).items()}
        return tensors | {f"optimizer.{name}": value for name, value in self.optimizers.tensors().items()}

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, and say so."""
        state, lines = self.checkpoints.load(self._tensors(), self.group)
        if state:
            self.model.load_state_dict(_named(state.tensors, "weights."))
            self.best = _named(state.tensors, "best.")
            self.optimizers.load(_named(state.tensors, "optimizer."))
            self.facts = state.facts | {"resumed_at": [*state.facts["resumed_at"], state.facts["step"]]}
            lines.append(f"goes on after step {state.facts['step']}, from {self.checkpoints.folder}")
        elif lines:
            lines.append("starts afresh: no checkpoint of this training is whole")
        elif self.checkpoints.others():
            lines.append("starts afresh: the unfinished trainings here are of other params, data or code")
        if self.group.is_main:
            for line in lines:
                tqdm.write(f"minigpt: {line}")

    def _metrics(self) -> dict[str, float]:
        """The training in numbers: losses in nats per character, times in seconds."""
        facts, seconds = self.facts, self.clock.seconds
        best = next(row for row in facts["history"] if row["step"] == facts["best_step"])
        characters = facts["step"] * self.train.batch_size * self.block_size
        metrics = {
            "best_step": facts["best_step"],
            "val_loss": best["val_loss"],
            "train_loss": best["train_loss"],
            "last_val_loss": facts["history"][-1]["val_loss"],
            "steps": facts["step"],
            "parameters": self.model.num_parameters(),
            "train_seconds": round(seconds, 2),
            "chars_per_second": round(characters / max(seconds, 1e-9)),
        }
        flops = self.model.flops_per_character() * characters / max(seconds, 1e-9)
        metrics["model_gflops"] = round(flops / 1e9, 3)
        if self.group.device.type == "cuda":
            metrics["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.group.device)
            name = torch.cuda.get_device_name(self.group.device)
            peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
            if peak:
                metrics["mfu"] = round(flops / (peak * self.group.world_size), 4)
        return metrics


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
