"""Training loop. On the same device, the result depends on params and corpus alone, however often it is interrupted."""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from minigpt.data.checks import check_context
from minigpt.data.dataset import Corpus
from minigpt.errors import UserError
from minigpt.evaluation.loss import cross_entropy, score
from minigpt.model import GPT
from minigpt.params import Params
from minigpt.runtime.device import compute_dtype, peak_flops
from minigpt.runtime.distributed import ProcessGroup, full_tensor, to_local
from minigpt.training.checkpoint import Checkpoint, Checkpoints, TrainState
from minigpt.training.control import CONTINUE, STOP, Control, DeferredScalars, Signals, Stopwatch
from minigpt.training.initial import initialize
from minigpt.training.memory import check_memory
from minigpt.training.optimizer import Optimizers, learning_rate
from minigpt.training.samples import indented, write_sample
from minigpt.training.scaling import LossScale

COMPILE_STEPS = 2000  # fewest steps for which compiling on a GPU is worth the minute that it takes
TRAIN_SAMPLE = 1 << 15  # characters of the training split that an evaluation scores
OVERFITTING = 2  # consecutive evaluations that count as overfitting: with a lower training loss than the best step's


class Observer(Protocol):
    """Receiver of metrics during a training."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a step. A resumed training repeats the steps after its checkpoint."""

    def history(self, rows: list[dict[str, float]]) -> None:
        """Record the evaluations so far."""

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Record the samples written so far."""

    def upload(self) -> None:
        """Flush the recorded metrics to the disk and start to upload them. Training time is not counted."""


@dataclass
class TrainResult:
    """Weights of the step with the lowest validation loss, rows of the tables, and final metrics."""

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    batches: list[dict[str, float]]
    samples: list[dict[str, Any]]
    metrics: dict[str, float]


def overfitting_since(history: list[dict[str, float]]) -> int | None:
    """Return the step of the lowest validation loss if the model overfits after it, else None.

    It does if at least OVERFITTING evaluations followed, and all of them have a lower training loss.
    """
    best = min(range(len(history)), key=lambda index: history[index]["val_loss"])
    later = history[best + 1 :]
    overfits = len(later) >= OVERFITTING and all(row["train_loss"] < history[best]["train_loss"] for row in later)
    return int(history[best]["step"]) if overfits else None


def should_compile(setting: str, device: torch.device, steps: int) -> bool:
    """Return whether ``train.compile`` asks for torch.compile; "auto" means long trainings on a GPU."""
    return setting == "always" or (setting == "auto" and device.type == "cuda" and steps >= COMPILE_STEPS)


class Trainer:
    """Training of one model, by the sections ``model`` and ``train`` of the params.

    The corpus is on the group's device. The caller holds the lock of the checkpoints. Only rank 0 has an observer.
    """

    def __init__(
        self, params: Params, corpus: Corpus, group: ProcessGroup, observer: Observer | None, checkpoints: Checkpoints
    ) -> None:
        check_context(len(corpus.train), params.model.block_size)
        self.train, self.block_size = params.train, params.model.block_size
        self.corpus, self.group, self.observer, self.checkpoints = corpus, group, observer, checkpoints
        check_memory(params, corpus.tokenizer.vocab_size, group.device, group.world_size)
        torch.manual_seed(self.train.seed)
        if group.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if self.train.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
        self.model = GPT(params.model, corpus.tokenizer.vocab_size)
        if self.train.init_from:
            initialize(self.model, corpus.tokenizer, Path(self.train.init_from))
        self.model.compute_dtype = compute_dtype(self.train.dtype, group.device)
        self.model.checkpointing = self.train.activation_checkpointing
        self.parallel = group.wrap(self.model)
        self.compiled = should_compile(self.train.compile, group.device, self.train.max_iters)
        self.logits: Callable[[Tensor], Tensor] = self.parallel
        self.half = self.model.compute_dtype == torch.float16  # its gradients need loss scaling
        muon_dtype = torch.float32 if self.half else self.model.compute_dtype or torch.float32
        self.optimizers = Optimizers(self.model, self.train, muon_dtype)
        self.found_inf = torch.zeros((), device=group.device)
        self.prompt = corpus.tokenizer.usable_prompt(params.sample.prompts[0])
        self.best: dict[str, Tensor] = {}  # weights with the lowest validation loss so far
        self.state, self.clock = TrainState(), Stopwatch(0.0)
        self.logged_at, self.progress = (0, 0.0), ""  # step and training time of the last report, and its text

    def run(self) -> TrainResult:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            UserError: the loss or the gradient is not finite; the weights in the last checkpoint are.
        """
        self._resume()
        train, state, scalars = self.train, self.state, DeferredScalars()
        self.clock = Stopwatch(state.train_seconds)
        # tqdm takes disable=None for "hidden unless the output is a terminal".
        disable = None if self.group.is_main else True
        bar = tqdm(total=train.max_iters, initial=state.step, unit="step", disable=disable)
        with Signals() as signals, bar:
            control = Control(self.group, signals, state.step)
            if self.compiled and state.step < train.max_iters:
                with self.clock.paused():
                    self.compile_model(state.step)
            self.logged_at = state.step, self.clock.seconds
            # One round more than there are steps: the last round only evaluates.
            for step in range(state.step, train.max_iters + 1):
                requests = self._measure(step, scalars)
                if step == train.max_iters or (train.patience and state.evaluations_since_best >= train.patience):
                    break
                requests += self._read(scalars.push(step, self.train_step(step, control.request)))
                state.step = step + 1
                bar.set_postfix_str(self.progress, refresh=False)
                bar.update()
                decision = control.decide(state.step, requests)
                if decision:
                    decision = max(decision, self._read(scalars.pop()))
                    with self.clock.paused():
                        self.save_checkpoint()
                    control.restart_timer(state.step)
                if decision >= STOP and (stopped := control.interruption(state.step)):
                    raise stopped
            if state.step < train.max_iters and self.group.is_main:
                tqdm.write(f"minigpt: stopping early: no better loss in {train.patience} evaluations")
            # Whatever happens until the result is exported, no step is trained twice.
            with self.clock.paused():
                self.save_checkpoint()
            if stopped := control.interruption(state.step):
                raise stopped
        weights = {name: full_tensor(value) for name, value in self.best.items()}
        return TrainResult(weights, state.history, state.batches, state.samples, self._metrics())

    def describe(self) -> str:
        """Return a line on the model and its device, and one on the length of the training."""
        train, device = self.train, self.group.device
        cuda = device.type == "cuda"
        threads = torch.get_num_threads()
        name = torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread{'s' if threads != 1 else ''}"
        dtype = str(self.model.compute_dtype or torch.float32).removeprefix("torch.")
        return (
            f"{self.model.num_parameters():,} parameters in {dtype} on {name};\n  "
            f"{train.max_iters:,} steps of {train.batch_size} x {self.block_size} characters"
            + (", compiled" if self.compiled else "")
            + (f", in {self.group.world_size} processes" if self.group.world_size > 1 else "")
        )

    def compile_model(self, step: int) -> None:
        """Compile the model for training, on the batch of ``step``. Weights do not change."""
        from torch._dynamo.exc import TorchDynamoException

        self.logits = torch.compile(self.parallel)
        try:
            self.accumulate_gradient(step)
        except TorchDynamoException as error:
            cause, _, _ = str(error).partition("\n\n")
            reason = f"torch.compile failed: {' '.join(cause.split())}"
            if self.train.compile == "always":
                raise UserError(f"train.compile: {reason}; set it to auto or never") from None
            if self.group.is_main:
                tqdm.write(f"minigpt: {reason}; training without it")
            self.logits, self.compiled = self.parallel, False
        self.model.zero_grad(set_to_none=True)

    def accumulate_gradient(self, step: int) -> Tensor:
        """Accumulate the gradient of the batch of ``step``. Return this rank's share of the loss."""
        train, group = self.train, self.group
        mine, windows = group.micro_batches(train.grad_accum), train.batch_size // train.grad_accum
        total = torch.zeros((), device=group.device)
        for micro in mine:
            first = step * train.batch_size + micro * windows
            stride = group.world_size * windows
            ids, targets = self.corpus.train.batch(train.seed, first, windows, self.block_size, prefetch_stride=stride)
            # Dropout and token noise depend only on the seed, the step and the micro-batch.
            key = hashlib.blake2b(f"{train.seed} {step} {micro}".encode(), digest_size=7).digest()
            torch.manual_seed(int.from_bytes(key, "big"))
            if train.token_noise:
                replaced = torch.rand(ids.shape, device=ids.device) < train.token_noise
                ids = torch.where(replaced, torch.randint_like(ids, self.model.vocab_size), ids)
            with group.no_sync(self.parallel, micro != mine[-1]):
                loss = cross_entropy(self.logits(ids) / train.temperature, targets)
                (loss * (self.state.loss_scale if self.half else 1) / len(mine)).backward()
            total += loss.detach() / train.grad_accum
        return total

    def train_step(self, step: int, request: int = CONTINUE) -> Tensor:
        """Do one optimizer step. Return loss, gradient norm and the sum of the ranks' requests, on the device."""
        total = self.accumulate_gradient(step)
        loss, requests = self.group.all_reduce_sum(torch.stack((total, torch.full_like(total, request)))).unbind()
        grads = [to_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        if self.half:
            LossScale(self.state).unscale(grads)
        norm = self.group.grad_norm(grads)
        if self.train.grad_clip:
            torch._foreach_mul_(grads, (self.train.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        finite = torch.isfinite(loss + norm)
        if self.half:  # waits for the device, as torch.amp.GradScaler does
            if finite:
                self.optimizers.step(step)
            if LossScale(self.state).update(bool(finite)):
                norm = norm.nan_to_num(0, 0, 0)  # an overflow is not an error: this step changes no weight
        elif finite.is_cuda:
            # Once set it stays set: no later step may change the weights before the host has read it.
            self.found_inf = torch.maximum(self.found_inf, (~finite).float())
            self.optimizers.step(step, self.found_inf)
        elif finite:
            self.optimizers.step(step)
        self.model.zero_grad(set_to_none=True)
        return torch.stack((loss, norm, requests))

    def evaluate(self, step: int) -> None:
        """Score both splits, and keep the weights if their validation loss is the lowest so far."""
        state, train = self.state, self.train
        if state.history and state.history[-1]["step"] >= step:
            return
        limits = ((self.corpus.train, min(TRAIN_SAMPLE, train.eval_chars)), (self.corpus.val, train.eval_chars))
        train_loss, val_loss = (score(self.model, split, None, chars, self.group).loss for split, chars in limits)
        losses = {"val_loss": val_loss, "train_loss": train_loss}  # MLflow's Compare offers the first metric
        state.history.append(
            {
                "step": step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "learning_rate": train.learning_rate * learning_rate(max(0, step - 1), train),  # of the last step
                "grad_norm": state.grad_norm,
            }
        )
        if self.observer:
            self.observer.metrics(step, losses)
            self.observer.history(state.history)
            self.observer.upload()
        state.evaluations_since_best += 1
        better = val_loss < state.best_loss or not self.best
        if better:
            state.best_loss, state.best_step, state.evaluations_since_best = val_loss, step, 0
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.group.is_main:
            best = "   best" if better else ""
            tqdm.write(f"step {step:6,d}   train {train_loss:.4f}   validation {val_loss:.4f}{best}")
            if state.evaluations_since_best == OVERFITTING and (since := overfitting_since(state.history)) is not None:
                tqdm.write(
                    f"minigpt: overfitting since step {since:,}: the validation loss rises while the training loss "
                    "falls. The best weights are kept. More text, a smaller model or more train.weight_decay or "
                    "model.dropout may help; train.patience stops early"
                )

    def write_sample(self, step: int) -> None:
        """Write a sample with the weights of this step, and report it. Nothing that training reads is changed."""
        model, group, samples, train = self.model, self.group, self.state.samples, self.train
        if not train.sample_chars or (samples and samples[-1]["step"] >= step) or not (group.is_main or group.sharded):
            return
        tokenizer, dtype = self.corpus.tokenizer, model.compute_dtype
        if not group.sharded:
            model.compute_dtype = None  # float32 weights are faster than casting each weight for one character
        ids = write_sample(model, tokenizer.encode(self.prompt).tolist(), train.sample_chars, train.seed)
        model.compute_dtype = dtype
        samples.append({"step": step, "prompt": self.prompt, "text": tokenizer.decode(ids)})
        if self.observer:
            self.observer.samples(samples)
            self.observer.upload()
        if group.is_main:
            tqdm.write(indented(samples[-1]["text"]))

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last step."""
        self.state.saved_step, self.state.train_seconds = self.state.step, self.clock.seconds
        if self.observer:
            # Metrics first: a training that resumes from this checkpoint does not report earlier steps again.
            self.observer.upload()
        self.checkpoints.save(Checkpoint(self._tensors(), self.state), self.group)

    def _measure(self, step: int, scalars: DeferredScalars) -> int:
        """Evaluate and write a sample, where these are due before ``step``. Their time does not count as training.

        Return the sum of the ranks' requests in the step before, if it was read for this.
        """
        train, requests = self.train, CONTINUE
        last = step == train.max_iters
        evaluated = last or step % train.eval_interval == 0
        if evaluated:
            requests = self._read(scalars.pop())
            with self.clock.paused():
                self.evaluate(step)
        if last or (step % train.sample_interval == 0 if train.sample_interval else evaluated):
            with self.clock.paused():
                self.write_sample(step)
        return requests

    def _read(self, scalars: tuple[int, list[float]] | None) -> int:
        """Record the scalars of a step. Return the sum of the ranks' requests."""
        if scalars is None:
            return CONTINUE
        step, (loss, norm, requests) = scalars
        if not math.isfinite(loss + norm):
            raise UserError(
                f"training diverged: at step {step} the loss is {loss:.4g} and the gradient norm {norm:.4g}, "
                f"at {learning_rate(step, self.train):.3g} of the peak learning rate {self.train.learning_rate:g}; "
                f"the last good checkpoint is of step {self.state.saved_step}. "
                "Try a smaller train.learning_rate or train.grad_clip: 1"
            )
        self.state.recent_losses.append(loss)
        self.state.grad_norm = norm
        if len(self.state.recent_losses) >= max(1, min(self.train.eval_interval, self.train.max_iters) // 10):
            self._log(step + 1)
        return int(requests)

    def _log(self, step: int) -> None:
        """Report the mean loss and the speed since the last report, up to ``step``."""
        state, train, (since, then), now = self.state, self.train, self.logged_at, self.clock.seconds
        loss = sum(state.recent_losses) / len(state.recent_losses)
        speed = (step - since) * train.batch_size * self.block_size / max(now - then, 1e-9)
        self.logged_at, self.progress = (step, now), f"loss {loss:.3f}, {speed:,.0f} characters/s"
        state.recent_losses.clear()
        state.batches.append({"step": step, "batch_loss": loss})
        rate = train.learning_rate * learning_rate(step - 1, train)
        if self.observer:
            values = {"batch_loss": loss, "learning_rate": rate, "grad_norm": state.grad_norm}
            self.observer.metrics(step, values | {"chars_per_second": speed})

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: weights, best weights, optimizer state."""
        weights = self.model.state_dict()
        parts = {"weights": weights, "best": self.best or weights, "optimizer": self.optimizers.tensors()}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def _resume(self) -> None:
        """Load the newest intact checkpoint, and report where training starts."""
        checkpoint, messages = self.checkpoints.load(self._tensors(), self.group)
        if checkpoint:
            self.model.load_state_dict(_with_prefix(checkpoint.tensors, "weights."))
            self.best = _with_prefix(checkpoint.tensors, "best.")
            self.optimizers.load(_with_prefix(checkpoint.tensors, "optimizer."))
            self.state = checkpoint.state
            self.state.resumed_at.append(self.state.step)
            messages.append(f"resuming after step {self.state.step}, from {self.checkpoints.folder}")
        elif messages:
            messages.append("starting from step 0: no checkpoint of this training is intact")
        elif self.checkpoints.started_before:
            messages.append("starting from step 0: the earlier start ended before its first checkpoint")
        elif self.checkpoints.count_others():
            messages.append("starting from step 0: the unfinished trainings here have other params, data or code")
        for message in messages if self.group.is_main else ():
            tqdm.write(f"minigpt: {message}")

    def _metrics(self) -> dict[str, float]:
        """Return the training in numbers: losses in nats per character, times in seconds."""
        state, seconds = self.state, max(self.clock.seconds, 1e-9)
        best = next(row for row in state.history if row["step"] == state.best_step)
        characters = state.step * self.train.batch_size * self.block_size
        flops = self.model.flops_per_character() * characters / seconds
        metrics = {
            "best_step": state.best_step, "val_loss": best["val_loss"], "train_loss": best["train_loss"],
            "last_val_loss": state.history[-1]["val_loss"],
            "steps": state.step, "parameters": self.model.num_parameters(),
            "train_seconds": round(seconds, 2), "chars_per_second": round(characters / seconds),
            "model_gflops": round(flops / 1e9, 3),
        }  # fmt: skip
        if (since := overfitting_since(state.history)) is not None:
            metrics["overfitting_since"] = since
        if self.group.device.type == "cuda":
            metrics["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.group.device)
            if peak := peak_flops(torch.cuda.get_device_name(self.group.device)):
                metrics["mfu"] = round(flops / (peak * self.group.world_size), 4)
        return metrics


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
