"""Contenders by measure, and the setup that they share: text, models, trainers, clocks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.peers import Peer
    from minigpt.data.dataset import Corpus
    from minigpt.params import Params
    from minigpt.training.trainer import Observer, Trainer

ROOT = Path(__file__).parent.parent

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
"""nanoGPT's documented size for a small machine; trained on batches of 12."""

FULL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
"""The size of the published system; trained on batches of 64."""

FLOPS = 6 * (6 * 12 * 384**2 + 65 * 384) + 12 * 6 * 256 * 384
"""Operations of training it on one character: 6 per weight, and attention (Chowdhery et al. 2022, appendix B)."""

SETTLED = "threads and memory as minigpt has them"
"""Marks peers that run with this project's thread and memory settings (minigpt/runtime/cpu.py), not their defaults."""


SHAKESPEARE = ROOT / "data" / "shakespeare.txt"

PACKAGES = ("torch", "numpy", "transformers", "x-transformers", "dvc")
"""Packages whose versions a file of results names."""

NANOGPT_LOSS = 1.4697
"""Validation loss of nanoGPT's model of 10.7 million parameters, by its README, in nats per character."""


def resolve_text(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make the path ``options.text`` absolute; end the program if there is no such file."""
    if not options.text.is_file():
        parser.error(f"{options.text}: no such file; `make shakespeare` fetches Tiny Shakespeare, --text names another")
    options.text = options.text.resolve()


def run_alone(module: str, *arguments: str, options: dict[str, Any], **environment: str) -> Any:
    """Run a module in a process of its own, and return the JSON of its last line; end the program if it fails."""
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", module, *arguments, *flags]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        sys.exit(f"benchmarks: {', '.join(arguments)}: failed; see the error above")
    return json.loads(ran.stdout.splitlines()[-1])


def describe_run(module: str, device: str) -> dict[str, Any]:
    """Return date, command, commit, hardware and versions, for a file of results."""
    import torch

    from minigpt.runtime.cpu import cpu_info
    from minigpt.tracking.system_metrics import describe_device

    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    machine: dict[str, Any] = {"device": describe_device(torch.device(device)), "cores": os.cpu_count()}
    machine |= {"cpu family": cpu_info("cpu family"), "model": cpu_info("model"), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": described.stdout.strip() or None,
        "machine": machine,
    }


def save_results(folder: Path, results: dict[str, Any], *names: str) -> Path:
    """Write results as JSON, in a file named by their date and ``names``, and return its path without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    moment = results["date"][:19].replace(":", "")
    path = folder / "-".join([moment, *names])
    path.with_name(f"{path.name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


def without_tracking() -> dict[str, str]:
    """Return the environment without the variables that name a tracking server: a benchmark sends no runs there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DAGSHUB_"))}


class NotMeasuredError(Exception):
    """A contender cannot be measured on this machine."""


Options = argparse.Namespace

Measured = dict[str, float]

MEASURES: dict[str, dict[str, Callable[[Options], Measured]]] = {}


def contender(measure: str, name: str, **settings: Any) -> Callable[[Callable[..., Measured]], Callable[..., Measured]]:
    """Enter a function, with some of its arguments, as a contender; this project's first, compiled ones foremost."""

    def enter(function: Callable[..., Measured]) -> Callable[..., Measured]:
        entered = MEASURES.get(measure, {}) | {name: lambda options: function(options, **settings)}
        MEASURES[measure] = dict(
            sorted(entered.items(), key=lambda e: (not e[0].startswith("minigpt"), not e[0].endswith("compiled"), e[0]))
        )
        return function

    return enter


def profile(name: str, **changes: dict[str, Any]) -> Params:
    """Return the params of a profile in ``configs/``, with changes by section."""
    from minigpt import params, profiles

    tree = profiles.load_profile(name, ROOT).model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return params.Params.model_validate(tree)


def prepared(options: Options) -> Corpus:
    """Encode the text and open it on the device."""
    from minigpt.data import dataset, encode

    with tempfile.TemporaryDirectory() as folder:
        encode.encode_corpus(options.text, 0.1, Path(folder))
        return dataset.load_corpus(Path(folder), options.device)


def peer(who: str, vocab_size: int, size: dict[str, int], device: str) -> Peer:
    """Return the model of a peer."""
    import torch

    from benchmarks import peers

    torch.manual_seed(1337)
    kinds = {"hf": peers.HuggingFace, "x": peers.XTransformers, "reference": peers.Reference}
    return kinds[who](vocab_size, **size).to(device)


def training(who: str, model: nn.Module, tokens: torch.Tensor, batch_size: int, block_size: int) -> Any:
    """Return the training of a peer: the reference's own, or nanoGPT's in bfloat16 where the hardware has it."""
    import torch

    from benchmarks import peers
    from minigpt.runtime.device import compute_dtype

    if who == "reference":
        return peers.ReferenceTraining(model, tokens, batch_size, block_size)
    dtype = compute_dtype("auto", tokens.device) or torch.float32
    return peers.NanoGPTTraining(model, tokens, batch_size, block_size, dtype)


def trainer(
    params: Params, corpus: Corpus, observer: Observer | None = None, kind: type[Trainer] | None = None
) -> Trainer:
    """Return a trainer of this project, or of the subclass ``kind``, without checkpoints and with exact losses."""
    from minigpt.runtime.distributed import ProcessGroup
    from minigpt.training.checkpoint import Checkpoint, Checkpoints
    from minigpt.training.trainer import Trainer

    class NoCheckpoints(Checkpoints):
        """Checkpoints that are never written, so each measurement starts at step 0 and its time includes no files."""

        def save(self, checkpoint: Checkpoint, group: ProcessGroup | None = None) -> None:
            """Save nothing."""

        def load(self, *like: Any) -> tuple[None, list[str]]:  # noqa: ARG002
            """Load nothing."""
            return None, []

    group = ProcessGroup(0, 1, corpus.train.tokens.device)
    whole = params.train.model_copy(update={"eval_chars": len(corpus.val)})
    params = params.model_copy(update={"train": whole})
    return (kind or Trainer)(params, corpus, group, observer, NoCheckpoints(Path(), "benchmark"))


def loss_curve(params: Params, corpus: Corpus) -> list[tuple[float, float]]:
    """Train to the end. Return the seconds of training and the exact validation loss at each evaluation."""
    curve: list[tuple[float, float]] = []

    class Watch:
        def metrics(self, step: int, values: dict[str, float]) -> None:  # noqa: ARG002
            if "val_loss" in values:
                curve.append((run.clock.seconds, values["val_loss"]))

        def history(self, rows: list[dict[str, float]]) -> None:
            """Ignore them; the curve is enough."""

        def samples(self, rows: list[dict[str, Any]]) -> None:
            """Ignore them."""

        def upload(self) -> None:
            """Send nothing."""

    run = trainer(params, corpus, Watch())
    run.run()
    return curve


class Timer:
    """Stopwatch that can be paused and waits for the work of a GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0
        self.resume()

    def pause(self) -> None:
        """Stop counting."""
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Count again."""
        self._wait()
        self._since = time.perf_counter()

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of square matrix products in ``dtype``, the median of ten."""
    import torch

    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(11):
        timer = Timer(device)
        a @ b
        timer.pause()
        seconds.append(timer.seconds)
    return 2 * n**3 / sorted(seconds[1:])[5]
