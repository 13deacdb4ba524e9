"""A text larger than most memories, prepared and trained on by the project's own programs.

python -m benchmarks.large FOLDER [--gigabytes 10] [--results benchmarks/results]

All files are in FOLDER/large, which is removed at the end. They need little more than twice the size of the text.
Memory is the peak of each process alone. ``rss`` is all memory that is not swapped out (VmHWM). ``anonymous`` is memory
without pages of files (RssAnon + RssShmem), read fifty times a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.common import ROOT, describe_run, save_results, without_tracking
from benchmarks.texts import parts

STEPS = 20


def write_text(target: Path, megabytes: int, files: int = 1) -> None:
    """Write a text of megabytes that differ in a number at their start, as one file or shared among several."""
    made = parts(16)
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        path = target / f"{number:04}.txt" if files > 1 else target
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            for place in range(megabytes * number // files, megabytes * (number + 1) // files):
                file.write(f"{place}\n".encode() + made[place % len(made)])


def watched(module: str, folder: Path, shown: str = "") -> dict[str, Any]:
    """Run a stage in ``folder``; return its seconds, those until it printed ``shown``, and its processes' peaks."""
    since, peaks, first = time.perf_counter(), dict[int, dict[str, float]](), None
    with (folder / "said.txt").open("w+") as said:
        command = [sys.executable, "-m", module]
        environment = without_tracking() | {"PYTHONUNBUFFERED": "1"}
        running = subprocess.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT, env=environment)
        parent = psutil.Process(running.pid)
        while running.poll() is None:
            for process in [parent, *parent.children(recursive=True)]:
                look(process.pid, peaks)
            if shown and first is None and shown in (folder / "said.txt").read_text():
                first = time.perf_counter() - since
            time.sleep(0.02)
        seconds = time.perf_counter() - since
    if running.returncode:
        sys.exit(f"benchmarks.large: {module} failed:\n{(folder / 'said.txt').read_text()}")
    print((folder / "said.txt").read_text())
    found: dict[str, Any] = {"seconds": seconds} | ({"seconds_until_training": first} if shown else {})
    for kind in ("rss", "anonymous"):
        found[f"peak_{kind}_megabytes"] = sorted((round(peak[kind]) for peak in peaks.values()), reverse=True)
    return found


def look(pid: int, peaks: dict[int, dict[str, float]]) -> None:
    """Record how much memory a process has, which may have ended meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    kilobytes = {name: int(rest[0]) for name, rest in values.items() if len(rest) == 2 and rest[1] == "kB"}
    now = {
        "rss": kilobytes.get("VmHWM", 0) * 1024 / 1e6,
        "anonymous": (kilobytes.get("RssAnon", 0) + kilobytes.get("RssShmem", 0)) * 1024 / 1e6,
    }
    before = peaks.setdefault(pid, now)
    peaks[pid] = {name: max(value, before[name]) for name, value in now.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    work = options.folder.resolve() / "large"
    megabytes = round(options.gigabytes * 1000)
    results = describe_run("benchmarks.large", "cpu")
    results |= {"command": f"python -m benchmarks.large FOLDER --gigabytes {options.gigabytes:g}", "prepare": {}}
    try:
        subprocess.run(["git", "clone", "--quiet", ROOT, work / "project"], check=True)
        for name, files in (("songs", 0), ("1,000 files", 1000), ("one file", 1)):
            text = work / "text"
            if files:
                write_text(text, megabytes, files)
            set_params(work / "project", text if files else Path("data/songs.txt"))
            found = watched("stages.prepare", work / "project")
            if files:
                size = sum(path.stat().st_size for path in [text, *text.rglob("*")] if path.is_file())
                results["prepare"][name] = {
                    "gigabytes": size / 1e9,
                    "megabytes_per_second": size / 1e6 / found["seconds"],
                }
                results["prepare"][name] |= found
                shutil.rmtree(text) if files > 1 else text.unlink()
            if files != 1000:
                results[f"train on {name}"] = watched("stages.train", work / "project", "parameters in")
            print(json.dumps(results, indent=2), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    save_results(options.results, results, "large")


def set_params(project: Path, text: Path) -> None:
    """Name the text in the project's params, and train on it for STEPS steps."""
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["data"] |= {"source": str(text)}
    params["train"] |= {"max_iters": STEPS, "eval_interval": STEPS // 2, "device": "cpu"}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
