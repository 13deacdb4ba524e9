"""Measures of one GPU in under nine minutes: speed, losses, determinism, and every path against the CPU.

    python -m benchmarks.gpu                  on a GPU
    python -m benchmarks.gpu --device cpu     the same in a small form, which shows that everything runs
    python -m benchmarks.gpu training ddp     measures whose names begin so

Each measure is a process of its own. One that fails or takes too long is reported as missing.
Writes a JSON file and a Markdown table. Needs torch, NumPy, PyYAML, ruamel.yaml, pydantic, tqdm, safetensors, filelock
and psutil. A peer is measured only if it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    NANOGPT_LOSS,
    ROOT,
    SHAKESPEARE,
    Timer,
    matrix_rate,
    peer,
    prepared,
    profile,
    resolve_text,
    save_results,
    trainer,
    training,
)

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt.training.trainer import Trainer

SECONDS = 520
"""Time for all measures; the rest of nine minutes is for the start and the end."""

SIZES: dict[str, tuple[dict[str, int], int]] = {
    "10.7M": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 64),
    "124M": ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}, 16),
    "350M": ({"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024}, 8),
}
"""Shapes with heads of 64 channels, and sequences of a step."""

SMALL: tuple[dict[str, int], int] = ({"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64}, 8)
"""Shape and sequences of every size in the small form."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "classic": {
        "positions": "learned", "embd_conv": 1, "embd_norm": False, "qk_norm": False, "norm_affine": True, "bias": True,
        "activation": "relu",
    },
    "window": {"attention_window": 20, "tied_head": True},
    "swiglu": {"activation": "swiglu"},
}  # fmt: skip

Figures = dict[str, float]
MEASURES: dict[str, Callable[[argparse.Namespace], Figures]] = {}


def measure(name: str, **settings: Any) -> Callable[[Callable[..., Figures]], Callable[..., Figures]]:
    """Enter a function, with some of its arguments, as a measure. The lowest of several decorators comes first."""

    def enter(function: Callable[..., Figures]) -> Callable[..., Figures]:
        MEASURES[name] = lambda options: function(options, **settings)
        return function

    return enter


def is_small(options: argparse.Namespace) -> bool:
    """Return whether the small form is wanted."""
    return not str(options.device).startswith("cuda")


def make_trainer(options: argparse.Namespace, size: str = "10.7M", **train: Any) -> Trainer:
    """Return a trainer of the recipe at a size of SIZES, without dropout and token noise."""
    shape, sequences = SMALL if is_small(options) else SIZES[size]
    changes = {"device": options.device, "token_noise": 0.0, "batch_size": sequences, "grad_accum": 1} | train
    return trainer(profile("shakespeare-gpu", model=shape | {"dropout": 0.0}, train=changes), prepared(options))


def seconds_per_step(options: argparse.Namespace, step: Callable[[int], Any]) -> float:
    """Return the mean time of a step, after some to warm up."""
    first, steps = (1, 3) if is_small(options) else (10, 30)
    for number in range(first):
        step(number)
    timer = Timer(options.device)
    for number in range(first, first + steps):
        step(number)
    timer.pause()
    return timer.seconds / steps


@measure("numerics")
def numerics(options: argparse.Namespace) -> Figures:
    """Return the largest difference of logits and gradients from the CPU's in float64, relative to the largest."""
    import torch

    from minigpt.evaluation.loss import cross_entropy
    from minigpt.model import GPT

    def passes(gpt: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = gpt(ids[:, :-1])
        gpt.zero_grad()
        cross_entropy(logits, ids[:, 1:]).backward()
        return logits.detach().double().cpu(), torch.cat([p.grad.flatten().double().cpu() for p in gpt.parameters()])

    found: Figures = {}
    ids = torch.randint(65, (4, 65), generator=torch.Generator().manual_seed(1))
    for name, changes in ARCHITECTURES.items():
        torch.manual_seed(0)
        config = profile("shakespeare-gpu", model=SMALL[0] | {"dropout": 0.0, "init": "normal"} | changes).model
        gpt = GPT(config, 65)
        exact = passes(gpt.double(), ids)
        gpt = gpt.float().to(options.device)
        for dtype in (None, torch.bfloat16):
            gpt.compute_dtype = dtype
            kind = str(dtype or torch.float32).removeprefix("torch.")
            for part, value, true in zip(
                ("logits", "gradient"), passes(gpt, ids.to(options.device)), exact, strict=True
            ):
                found[f"{name}, {kind}, {part}"] = ((value - true).abs().max() / true.abs().max()).item()
    return found


@measure("training, 350M", size="350M")
@measure("training, 124M", size="124M")
@measure("training, 10.7M", size="10.7M")
def training_speed(options: argparse.Namespace, size: str) -> Figures:
    """Return characters per second, and their share of the rate of matrix products and of the data sheet's (MFU)."""
    import torch

    from minigpt.runtime.device import peak_flops

    run = make_trainer(options, size)
    if run.compiled:
        run.compile_model(0)
    seconds = seconds_per_step(options, run.train_step)
    characters = run.train.batch_size * run.block_size / seconds
    operations = run.model.flops_per_character() * characters
    found = {"characters per second": characters, "parameters": run.model.num_parameters()}
    found["of the rate of matrix products"] = operations / matrix_rate(
        options.device, run.model.compute_dtype or torch.float32
    )
    if not is_small(options):
        name = torch.cuda.get_device_name()
        if peak := peak_flops(name):
            found["MFU"] = operations / peak
        found["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


@measure("Hugging Face GPT-2, nanoGPT's settings, 10.7M")
def peer_speed(options: argparse.Namespace) -> Figures:
    """Return the characters per second of the peer, in the same steps."""
    corpus = prepared(options)
    shape, sequences = SMALL if is_small(options) else SIZES["10.7M"]
    model = peer("hf", corpus.tokenizer.vocab_size, shape, options.device)
    run = training("hf", model, corpus.train.tokens, sequences, shape["block_size"])
    return {"characters per second": sequences * shape["block_size"] / seconds_per_step(options, run.step)}


@measure("the published system, 5,000 steps", config="reference")
@measure("the recipe, to its end", config="shakespeare-gpu")
def losses(options: argparse.Namespace, config: str) -> Figures:
    """Return the seconds of training, the best exact validation loss, and the seconds to that of nanoGPT."""
    train = {"device": options.device} | ({"max_iters": 4, "eval_interval": 2} if is_small(options) else {})
    model: dict[str, Any] = dict(SMALL[0]) if is_small(options) else {}
    run = trainer(profile(config, model=model, train=train), prepared(options))
    reached: list[float] = []
    evaluate = run.evaluate

    def watch(step: int) -> None:
        evaluate(step)
        if run.state.best_loss <= NANOGPT_LOSS:
            reached.append(run.clock.seconds)

    run.evaluate = watch  # type: ignore[method-assign]
    result = run.run()
    found = {key: result.metrics[key] for key in ("train_seconds", "val_loss", "best_step", "chars_per_second")}
    return found | ({f"seconds to {NANOGPT_LOSS}": reached[0]} if reached else {})


@measure("writing 512 texts", samples=512)
@measure("writing 64 texts", samples=64)
@measure("writing 1 text", samples=1)
def writing(options: argparse.Namespace, samples: int) -> Figures:
    """Return characters per second at 10.7M parameters, and whether greedy text in float32 is that of the CPU."""
    import torch

    from minigpt.data.tokenizer import Tokenizer
    from minigpt.generation.generator import Generator
    from minigpt.model import GPT
    from minigpt.params import SamplingParams

    torch.manual_seed(0)
    tokenizer = Tokenizer("\n" + "".join(map(chr, range(33, 97))))
    shape = SMALL[0] if is_small(options) else SIZES["10.7M"][0]
    gpt = GPT(profile("shakespeare-gpu", model=shape | {"dropout": 0.0, "init": "normal"}).model, 65).eval()
    greedy = SamplingParams(temperature=0, max_new_tokens=50)
    expected = Generator(gpt, tokenizer, compile="never").generate("\n", greedy)[0]
    writer = Generator(gpt.to(options.device), tokenizer, compile="never")
    found = {"as on the CPU": float(writer.generate("\n", greedy)[0] == expected)}
    length = 20 if is_small(options) else 250
    sampling = SamplingParams(max_new_tokens=length, seed=1)
    writer.generate("\n", sampling, samples)
    timer = Timer(options.device)
    writer.generate("\n", sampling, samples)
    timer.pause()
    return found | {"characters per second": samples * length / timer.seconds}


def weights_after(options: argparse.Namespace, steps: int, **train: Any) -> tuple[Tensor, float]:
    """Return all weights after some steps, an evaluation and a sample; and the seconds per step after the first."""
    import torch

    run = make_trainer(options, compile="never", **train)
    run.train_step(0)
    timer = Timer(options.device)
    for step in range(1, steps):
        run.train_step(step)
    timer.pause()
    run.evaluate(steps)
    run.write_sample(steps)
    return torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()]), timer.seconds / (steps - 1)


@measure("determinism")
def determinism(options: argparse.Namespace) -> Figures:
    """Return whether two trainings are bitwise equal, without and with train.deterministic, and its cost."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch reads it before the first product only
    found: Figures = {}
    for deterministic in (False, True):
        (first, seconds), (second, again) = (weights_after(options, 20, deterministic=deterministic) for _ in range(2))
        name = "deterministic" if deterministic else "default"
        found |= {f"{name}, equal": float(first.equal(second)), f"{name}, seconds per step": min(seconds, again)}
    return found


@measure("activation checkpointing")
def activation_checkpointing(options: argparse.Namespace) -> Figures:
    """Compare the weights of a training that computes activations again with those of one that keeps them."""
    kept, seconds = weights_after(options, 5)
    computed, slower = weights_after(options, 5, activation_checkpointing=True)
    return {"largest difference": (kept - computed).abs().max().item(), "time compared with keeping": slower / seconds}


@measure("number formats")
def number_formats(options: argparse.Namespace) -> Figures:
    """Return the validation loss after 20 steps in each format. In float16, the loss is scaled."""
    from minigpt.evaluation.loss import score

    found: Figures = {}
    for dtype in ("float32", "bfloat16", "float16"):
        run = make_trainer(options, compile="never", dtype=dtype)
        for step in range(20):
            run.train_step(step)
        found[f"{dtype}, loss"] = score(run.model, run.corpus.val, max_chars=20_000).loss
    return found


@measure("DDP of one process")
def ddp(options: argparse.Namespace) -> Figures:
    """Compare the weights of a training in DistributedDataParallel with those without it, and its time."""
    import torch
    from torch import distributed, nn

    alone, seconds = weights_after(options, 5)
    with tempfile.TemporaryDirectory() as folder:
        backend = "gloo" if is_small(options) else "nccl"
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        run = make_trainer(options, compile="never")
        run.logits = run.parallel = nn.parallel.DistributedDataParallel(run.model)
        run.train_step(0)
        timer = Timer(options.device)
        for step in range(1, 5):
            run.train_step(step)
        timer.pause()
        distributed.destroy_process_group()
    weights = torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()])
    found = {"bitwise equal": float(weights.equal(alone)), "largest difference": (weights - alone).abs().max().item()}
    return found | {"time compared with one process": timer.seconds / 4 / seconds}


def run_measure(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run one measure in a process of its own; a failure is the value of ``missing``."""
    if limit <= 0:
        return {"missing": f"not started: the {SECONDS} s for all measures are over"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--device", options.device]
    command += ["--text", str(options.text)]
    began = time.monotonic()
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": f"not finished in the {limit:.0f} s that were left"}
    if ran.returncode:
        return {"missing": (ran.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found | {"wall seconds": round(time.monotonic() - began, 1)}


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"{results['device']}, torch {results['torch']}, {results['date']}, `{results['command']}`", ""]
    lines += ["| measure | figure | value |", "| --- | --- | ---: |"]
    for name, figures in results["measures"].items():
        for figure, value in figures.items():
            shown = value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
            lines.append(f"| {name} | {figure} | {shown} |")
    return "\n".join(lines) + "\n"


@contextmanager
def quiet() -> Iterator[None]:
    """Send the output of a training to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main() -> None:
    """Run the command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", nargs="*", help="beginnings of: " + "; ".join(MEASURES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE if SHAKESPEARE.exists() else ROOT / "data/drama.txt")
    parser.add_argument("--results", type=Path, default=Path("results/benchmarks"), help="a folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with quiet():
            found = MEASURES[options.one](options)
        print(json.dumps(found))
        return
    resolve_text(parser, options)
    if not is_small(options) and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch has no GPU here; --device cpu runs the small form")
    chosen = [name for name in MEASURES if not options.measures or name.startswith(tuple(options.measures))]
    if not chosen:
        parser.error(f"no measure begins with {' or '.join(options.measures)}; there are {'; '.join(MEASURES)}")
    began, now = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    results: dict[str, Any] = {
        "date": now,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if not is_small(options) else f"{platform.machine()} CPU, small form",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "text": options.text.name,
        "measures": {},
    }
    for name in chosen:
        results["measures"][name] = run_measure(name, options, SECONDS - (time.monotonic() - began))
        print(f"{name}: {json.dumps(results['measures'][name])}", flush=True)
        written = save_results(options.results, results, "gpu-small" if is_small(options) else "gpu")
        written.with_name(f"{written.name}.md").write_text(table(results), encoding="utf-8")
    print(f"\nwritten to {written}.json and {written}.md")


if __name__ == "__main__":
    main()
