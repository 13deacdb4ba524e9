"""Measures of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import (
    FLOPS,
    FULL,
    SETTLED,
    SMALL,
    Measured,
    Options,
    Timer,
    contender,
    loss_curve,
    matrix_rate,
    peer,
    prepared,
    profile,
    trainer,
    training,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from minigpt.model import GPT


@contender("seconds to a loss", "minigpt")
def loss_of_minigpt(options: Options) -> Measured:
    """Train a profile to its end; return the seconds of training until the exact validation loss was reached."""
    name = "shakespeare-gpu" if options.device.startswith("cuda") else "shakespeare-quick"
    seed = 1337 + options.round
    curve = loss_curve(profile(name, train={"device": options.device, "seed": seed}), prepared(options))
    reached = [seconds for seconds, loss in curve if loss <= options.loss]
    return {"value": reached[0] if reached else float("inf"), "loss": min(loss for _, loss in curve)}


@contender("seconds to a loss", "Hugging Face GPT-2, trained as nanoGPT documents", who="hf", every=100, most=6000)
@contender("seconds to a loss", "reference algorithm", who="reference", every=250, most=20000)
def loss_of_peer(options: Options, who: str, every: int, most: int) -> Measured:
    """Train a peer until the loss is reached, scored exactly every ``every`` steps while the clock is stopped."""
    from minigpt.evaluation.loss import score

    on_gpu = options.device.startswith("cuda")
    size, batch_size = (FULL, 64) if on_gpu else (SMALL, 12)
    corpus = prepared(options)
    model = peer(who, corpus.tokenizer.vocab_size, size, options.device)
    run = training(who, model, corpus.train.tokens, batch_size, size["block_size"])
    timer, least = Timer(options.device), float("inf")
    for step in range(most):
        run.step(step)
        if (step + 1) % every == 0:
            timer.pause()
            least = min(least, score(cast("GPT", model), corpus.val).loss)
            if least <= options.loss:
                return {"value": timer.seconds, "loss": least}
            timer.resume()
    return {"value": float("inf"), "loss": least, "gave_up_after": timer.seconds}


@contender("training, characters per second", "minigpt", config="shakespeare-gpu")
@contender("training, characters per second", "minigpt, the classic architecture", config="classic-gpu")
def speed_of_minigpt(options: Options, config: str) -> Measured:
    """Time steps of 64 x 256 characters at the published size, without dropout."""
    import torch

    off = {"device": options.device, "dtype": "auto", "token_noise": 0.0}
    params = profile(config, model={"dropout": 0.0}, train=off)
    run = trainer(params, prepared(options))
    if run.compiled:
        run.compile_model(0)
    dtype = run.model.compute_dtype or torch.float32
    return speed(options, run.train_step, run.model, dtype)


@contender("training, characters per second", "Hugging Face GPT-2", who="hf")
@contender("training, characters per second", f"Hugging Face GPT-2, {SETTLED}", who="hf")
@contender("training, characters per second", "x-transformers", who="x")
@contender("training, characters per second", f"x-transformers, {SETTLED}", who="x")
@contender("training, characters per second", "reference algorithm, float32", who="reference")
def speed_of_peer(options: Options, who: str) -> Measured:
    """Time the same steps of a peer."""
    import torch

    corpus = prepared(options)
    model = peer(who, corpus.tokenizer.vocab_size, FULL, options.device)
    run = training(who, model, corpus.train.tokens, 64, 256)
    return speed(options, run.step, model, getattr(run, "dtype", torch.float32))


def speed(options: Options, step: Callable[[int], Any], model: nn.Module, dtype: torch.dtype) -> Measured:
    """Time a training's steps, between two measurements of the machine's rate; evaluation is not in it."""
    import torch

    steps, skipped = (50, 20) if options.device.startswith("cuda") else (2, 1)
    before = matrix_rate(options.device, dtype)
    for number in range(skipped):
        step(number)
    timer = Timer(options.device)
    for number in range(skipped, skipped + steps):
        step(number)
    timer.pause()
    rate = (before + matrix_rate(options.device, dtype)) / 2
    characters = steps * 64 * FULL["block_size"]
    measured = {
        "value": characters / timer.seconds,
        "of_matrix_rate": characters * FLOPS / timer.seconds / rate,
        "matrix_gflops": rate / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if options.device.startswith("cuda"):
        measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return measured
