"""One measurement of one contender, in a process of its own: ``python -m benchmarks.contenders MEASURE CONTENDER ...``.

Prints one line of JSON. All contenders get the same text and the same clock; the peers run as their users run them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minigpt.runtime import cpu

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.peers import Peer
    from minigpt.data.dataset import Corpus
    from minigpt.generation.native import CompileMode
    from minigpt.model import GPT
    from minigpt.params import Params
    from minigpt.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
"""nanoGPT's documented size for a small machine; trained on batches of 12."""
FULL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
"""The size of the published system; trained on batches of 64."""
FLOPS = 6 * (6 * 12 * 384**2 + 65 * 384) + 12 * 6 * 256 * 384
"""Of training that on a character: 6 for a weight, and attention (Chowdhery et al. 2022, appendix B)."""

ONE_TEXT = "writing one text, characters per second"
SIXTEEN = "writing 16 texts, characters per second"

SETTLED = "threads and memory as minigpt has them"
"""Of a peer: it gets what this project's programs do for themselves (minigpt/process.py), and its users do not have."""


class NotMeasuredError(Exception):
    """This machine is not one to measure a contender on."""


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
    """The text, encoded, on the device."""
    from minigpt.data import dataset, encode

    with tempfile.TemporaryDirectory() as folder:
        encode.encode_corpus(options.text, 0.1, Path(folder))
        return dataset.load_corpus(Path(folder), options.device)


def peer(who: str, vocab_size: int, size: dict[str, int], device: str) -> Peer:
    """A peer's model."""
    import torch

    from benchmarks import peers

    torch.manual_seed(1337)
    kinds = {"hf": peers.HuggingFace, "x": peers.XTransformers, "reference": peers.Reference}
    return kinds[who](vocab_size, **size).to(device)


def training(who: str, model: nn.Module, tokens: torch.Tensor, batch_size: int, block_size: int) -> Any:
    """A peer's training: the reference's own, or nanoGPT's in bfloat16 where the hardware has it."""
    import torch

    from benchmarks import peers
    from minigpt.runtime.device import compute_dtype

    if who == "reference":
        return peers.ReferenceTraining(model, tokens, batch_size, block_size)
    dtype = compute_dtype("auto", tokens.device) or torch.float32
    return peers.NanoGPTTraining(model, tokens, batch_size, block_size, dtype)


def trainer(params: Params, corpus: Corpus, observer: Any = None, kind: type[Trainer] | None = None) -> Trainer:
    """This project's trainer, or a kind of it, which keeps no checkpoints here."""
    from minigpt.runtime.distributed import ProcessGroup
    from minigpt.training.checkpoint import Checkpoints
    from minigpt.training.trainer import Trainer

    os.environ |= {"MINIGPT_CHECKPOINT_SECONDS": "inf", "MINIGPT_CHECKPOINT_STEPS": str(10**9)}
    group = ProcessGroup(0, 1, corpus.train.tokens.device)
    return (kind or Trainer)(params, corpus, group, observer, Checkpoints(Path(), "benchmark"))


class Timer:
    """Seconds that have passed, without the pauses; a GPU's work is waited for."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0
        self.resume()

    def pause(self) -> None:
        """Stop counting."""
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Go on counting."""
        self._wait()
        self._since = time.perf_counter()

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products in ``dtype``: the median of ten."""
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


@contender("seconds to a loss", "minigpt")
def loss_of_minigpt(options: Options) -> Measured:
    """Train a profile to its end; the seconds of training until the exact validation loss was reached."""
    name = "shakespeare-gpu" if options.device.startswith("cuda") else "shakespeare-quick"
    curve: list[tuple[float, float]] = []

    class Watch:
        def metrics(self, step: int, values: dict[str, float]) -> None:  # noqa: ARG002
            if "val_loss" in values:
                curve.append((run.clock.seconds, values["val_loss"]))

        def upload(self) -> None:
            """Nothing to send."""

    seed = 1337 + options.round
    run = trainer(profile(name, train={"device": options.device, "seed": seed}), prepared(options), Watch())
    run.run()
    reached = [seconds for seconds, loss in curve if loss <= options.loss]
    return {"value": reached[0] if reached else float("inf"), "loss": min(loss for _, loss in curve)}


@contender("seconds to a loss", "Hugging Face GPT-2, trained as nanoGPT documents", who="hf", every=100, most=6000)
@contender("seconds to a loss", "reference algorithm", who="reference", every=250, most=20000)
def loss_of_peer(options: Options, who: str, every: int, most: int) -> Measured:
    """Train a peer, scoring exactly every so many steps off the clock, until the loss is reached."""
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
    """Steps of 64 x 256 characters at the published size, without dropout."""
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
    """The same of a peer."""
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


@contender("scoring the validation split, seconds", "minigpt, exact")
def scoring_exact(options: Options) -> Measured:
    """Every target of the validation split once."""
    from minigpt.evaluation.loss import score
    from minigpt.model import GPT
    from minigpt.runtime.device import compute_dtype

    corpus = prepared(options)
    model = GPT(profile("shakespeare-cpu").model, corpus.tokenizer.vocab_size).to(options.device)
    model.compute_dtype = compute_dtype("auto", corpus.val.tokens.device)
    score(model, corpus.val, max_chars=20_000)
    timer = Timer(options.device)
    count = score(model, corpus.val).count
    timer.pause()
    return {"value": timer.seconds, "characters": count}


@contender("scoring the validation split, seconds", "200 random batches")
def scoring_sampled(options: Options) -> Measured:
    """The usual estimate, by the same model, from batches of the size that it is trained on."""
    from benchmarks import peers
    from minigpt.model import GPT
    from minigpt.runtime.device import compute_dtype

    corpus = prepared(options)
    params = profile("shakespeare-cpu")
    model = GPT(params.model, corpus.tokenizer.vocab_size).to(options.device).eval()
    model.compute_dtype = compute_dtype("auto", corpus.val.tokens.device)
    B, T = params.train.batch_size, params.model.block_size
    peers.sampled_loss(model, corpus.val.tokens, B, T, 2)
    timer = Timer(options.device)
    peers.sampled_loss(model, corpus.val.tokens, B, T)
    timer.pause()
    return {"value": timer.seconds, "characters": 200 * B * T}


def writer(options: Options) -> Path:
    """Return the folder of an exported model of the published size, trained for 100 steps once and kept."""
    from minigpt.export import export

    folder = ROOT / "results" / "benchmarks" / f"writer-{options.device.replace(':', '-')}"
    if not folder.exists():
        changes = {"device": options.device, "max_iters": 100, "batch_size": 8, "grad_accum": 1, "eval_interval": 100}
        params = profile("shakespeare-gpu", train=changes | {"eval_chars": 20_000})
        corpus = prepared(options)
        outcome = trainer(params, corpus).run()
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(folder, params.model, outcome.weights, corpus.tokenizer)
    return folder


@contender(ONE_TEXT, "minigpt, int8, compiled", batch=1, dtype="int8", compile="always")
@contender(ONE_TEXT, "minigpt, bfloat16, compiled", batch=1, dtype="bfloat16", compile="always")
@contender(ONE_TEXT, "minigpt, float32, compiled", batch=1, dtype="float32", compile="always")
@contender(SIXTEEN, "minigpt, int8, compiled", batch=16, dtype="int8", compile="always")
@contender(SIXTEEN, "minigpt, bfloat16, compiled", batch=16, dtype="bfloat16", compile="always")
@contender(ONE_TEXT, "minigpt, int8", batch=1, dtype="int8")
@contender(ONE_TEXT, "minigpt, bfloat16", batch=1, dtype="bfloat16")
@contender(SIXTEEN, "minigpt, bfloat16", batch=16, dtype="bfloat16")
@contender(SIXTEEN, "minigpt, int8", batch=16, dtype="int8")
@contender("writing 512 texts, characters per second", "minigpt, bfloat16", batch=512, dtype="bfloat16")
def writing_of_minigpt(options: Options, batch: int, dtype: str, compile: CompileMode = "never") -> Measured:  # noqa: A002
    """Write with a model of the published size at temperature 0.8 and top-p 0.95; 512 texts on a GPU only."""
    import torch

    from minigpt.generation.compiler import NotCompiledError, build_library
    from minigpt.generation.generator import Generator
    from minigpt.params import SamplingParams

    if compile == "always":
        if options.device != "cpu":
            raise NotMeasuredError("compiled decoders are for a CPU")
        try:
            build_library()
        except NotCompiledError as error:
            raise NotMeasuredError(str(error)) from None
    generator = Generator.load(writer(options), torch.device(options.device), dtype, compile=compile)

    def write(length: int) -> list[str]:
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=1 + options.round, max_new_tokens=length)
        return generator.generate("\n", sampling, batch)

    return writing(options, batch, write)


@contender(ONE_TEXT, "Hugging Face generate", who="hf", batch=1)
@contender(ONE_TEXT, f"Hugging Face generate, {SETTLED}", who="hf", batch=1)
@contender(ONE_TEXT, "x-transformers generate", who="x", batch=1)
@contender(ONE_TEXT, "loop without a cache", who="reference", batch=1)
@contender(SIXTEEN, "Hugging Face generate", who="hf", batch=16)
@contender(SIXTEEN, "x-transformers generate", who="x", batch=16)
@contender("writing 512 texts, characters per second", "Hugging Face generate", who="hf", batch=512)
def writing_of_peer(options: Options, who: str, batch: int) -> Measured:
    """A peer of the published size writes: a library's in bfloat16 where the hardware has it."""
    import torch

    from minigpt.runtime.device import has_bfloat16

    model = peer(who, 65, FULL, options.device).eval()
    if who != "reference":
        model = model.to(torch.bfloat16 if has_bfloat16(torch.device(options.device)) else torch.float32)
    start = torch.zeros(batch, 1, dtype=torch.long, device=options.device)
    return writing(options, batch, lambda length: model.generate(start, length))


def writing(options: Options, batch: int, write: Callable[[int], Any]) -> Measured:
    """Time 250 characters a text, within the context of 256, after a few to warm up."""
    if batch > 100 and not options.device.startswith("cuda"):
        raise NotMeasuredError("so many at once are for a GPU")
    write(5)
    timer = Timer(options.device)
    write(250)
    timer.pause()
    return {"value": 250 * batch / timer.seconds}


@contender("first character, seconds", "minigpt, of a loaded model")
def first_of_minigpt(options: Options) -> Measured:
    """From the call to the first character, of a short prompt."""
    import torch

    from minigpt.generation.generator import Generator
    from minigpt.params import SamplingParams

    generator = Generator.load(writer(options), torch.device(options.device), compile="never")
    timer = Timer(options.device)
    next(generator.stream("ROMEO:\n", SamplingParams(temperature=0.8, max_new_tokens=100)))
    timer.pause()
    return {"value": timer.seconds}


@contender("first character, seconds", "minigpt write, from the start of the process")
def first_in_a_terminal(options: Options) -> Measured:
    """Until it has shown the prompt and a character more."""
    command = [sys.executable, "-m", "minigpt", "write", "ROMEO:"]
    command += ["--model", str(writer(options)), "--device", options.device]
    since = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as running:
        shown = running.stdout.read(len("ROMEO:") + 1) if running.stdout else b""
        seconds = time.perf_counter() - since
        running.kill()
    return {"value": seconds, "shown": len(shown)}


@contender("encoding, MB per second", "minigpt", way="minigpt")
@contender("encoding, MB per second", "a dictionary and a list", way="dictionary")
def encoding(options: Options, way: str) -> Measured:
    """Encode a text of mixed Latin and Devanagari; also the peak memory of the process, which never loads torch."""
    from benchmarks import texts
    from minigpt.data import encode

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        arguments = [str(text), str(options.megabytes)]  # written by another process, whose memory does not count
        subprocess.run([sys.executable, "-m", "benchmarks.texts", *arguments], check=True, cwd=ROOT)
        since = time.perf_counter()
        if way == "minigpt":
            encode.encode_corpus(text, 0.1, folder)
        else:
            texts.encode_by_dictionary(text, folder)
        seconds = time.perf_counter() - since
        megabytes = text.stat().st_size / 1e6
    measured = {"value": megabytes / seconds, "megabytes": megabytes}
    # Not getrusage: its peak includes that of the process that started this one.
    if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
        measured["peak_megabytes"] = int(peak[1]) * 1024 / 1e6
    return measured


@contender("dvc repro with nothing to do, seconds", "minigpt")
def nothing_to_do(options: Options) -> Measured:  # noqa: ARG001 - the same on any device
    """``dvc repro`` in a copy of the project where every stage is up to date."""
    import yaml

    if importlib.util.find_spec("dvc") is None:
        raise ImportError("dvc is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["train"] |= {"max_iters": 2}
        params["sample"] |= {"max_new_tokens": 5}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        for _ in range(2):
            since = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True, cwd=folder, stdout=sys.stderr)
        return {"value": time.perf_counter() - since}


def main() -> None:
    """Measure one contender once; why it cannot be is told as ``missing``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "shakespeare.txt")
    parser.add_argument("--loss", type=float, default=1.88)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--round", type=int, default=0)
    options = parser.parse_args()
    ours = options.device == "cpu" and options.contender.startswith("minigpt") and "encoding" not in options.measure
    if ours or options.contender.endswith(SETTLED):  # as the project's own programs do; the one that encodes does not
        cpu.configure_cpu(spin=options.measure.startswith(("writing", "first")))
    try:
        measured: dict[str, Any] = MEASURES[options.measure][options.contender](options)
    except (ImportError, NotMeasuredError) as error:
        measured = {"missing": str(error)}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
