"""Measures of writing text."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    FULL,
    ROOT,
    SETTLED,
    Measured,
    NotMeasuredError,
    Options,
    Timer,
    contender,
    peer,
    prepared,
    profile,
    trainer,
)

if TYPE_CHECKING:
    from minigpt.params import Compile

ONE_TEXT = "writing one text, characters per second"

SIXTEEN = "writing 16 texts, characters per second"


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
def writing_of_minigpt(options: Options, batch: int, dtype: str, compile: Compile = "never") -> Measured:  # noqa: A002
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
    """Write with a peer of the published size, one of a library in bfloat16 where the hardware has it."""
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
        raise NotMeasuredError("512 texts in one batch need a GPU")
    write(5)
    timer = Timer(options.device)
    write(250)
    timer.pause()
    return {"value": 250 * batch / timer.seconds}


@contender("first character, seconds", "minigpt, of a loaded model")
def first_of_minigpt(options: Options) -> Measured:
    """Time from the call to the first character after a short prompt."""
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
    """Time a new process until it has shown the prompt and one more character."""
    command = [sys.executable, "-m", "minigpt", "write", "ROMEO:"]
    command += ["--model", str(writer(options)), "--device", options.device]
    since = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as running:
        shown = running.stdout.read(len("ROMEO:") + 1) if running.stdout else b""
        seconds = time.perf_counter() - since
        running.kill()
    return {"value": seconds, "shown": len(shown)}
