"""Measures of encoding, and of a pipeline with nothing to do."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, Measured, Options, contender, without_tracking


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
    """Time ``dvc repro`` in a copy of the project where every stage is up to date."""
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
            command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
            subprocess.run(command, check=True, cwd=folder, env=without_tracking(), stdout=sys.stderr)
        return {"value": time.perf_counter() - since}
