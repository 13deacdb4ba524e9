"""The loss that a time of training buys: profiles of this project, each over several seeds, next to peers.

    python -m benchmarks.budgets                                 the profiles for a CPU, and the peers
    python -m benchmarks.budgets shakespeare-cpu --seeds 1 --peers       one profile alone
    python -m benchmarks.budgets shakespeare-1min --steps 470            in a shorter training
    python -m benchmarks.budgets shakespeare-cpu --held-out start        on another split
    python -m benchmarks.budgets shakespeare-cpu --text FILE             on another text

Losses are exact, on the validation split in windows that do not overlap. Each training is a process of its own, and
the clock stops while it is evaluated. Prints a table; writes it with all curves as JSON, and draws the curves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import (
    SHAKESPEARE,
    SMALL,
    Timer,
    describe_run,
    loss_curve,
    peer,
    prepared,
    profile,
    resolve_text,
    run_alone,
    save_results,
    training,
)

if TYPE_CHECKING:
    from minigpt.model import GPT

PROFILES = ["shakespeare-quick", "shakespeare-1min", "shakespeare-cpu", "classic-cpu"]
PEERS = {
    "hf": "Hugging Face GPT-2, trained as nanoGPT documents",
    "x": "x-transformers, trained in the same way",
    "reference": "reference algorithm",
}
POINTS = 16
"""Evaluations of a peer."""

HEIGHT = 1.2
"""Nats above the lowest loss that are drawn: the first evaluations would hide the differences of the others."""

Curve = list[tuple[float, float]]
"""Seconds of training, and the exact validation loss after them."""


def train_profile(name: str, seed: int, options: argparse.Namespace) -> Curve:
    """Train a profile, for its own number of steps or the one of the command line."""
    from minigpt.runtime import cpu

    cpu.configure_cpu()
    changes = {"device": options.device, "seed": seed, "sample_chars": 0}
    if options.steps:
        changes["max_iters"] = options.steps
    return loss_curve(profile(name, train=changes), prepared(options))


def train_peer(who: str, seconds: float, options: argparse.Namespace) -> Curve:
    """Train a peer for ``seconds``."""
    from minigpt.evaluation.loss import score

    corpus = prepared(options)
    model = peer(who, corpus.tokenizer.vocab_size, SMALL, options.device)
    run = training(who, model, corpus.train.tokens, 12, SMALL["block_size"])
    curve: Curve = []
    timer, step = Timer(options.device), 0
    while len(curve) < POINTS:
        run.step(step)
        step += 1
        timer.pause()
        if timer.seconds >= seconds * (len(curve) + 1) / POINTS:
            curve.append((timer.seconds, score(cast("GPT", model), corpus.val).loss))
        timer.resume()
    return curve


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a contender in a process of its own; ``missing`` is why it cannot be trained here."""
    given = {
        "one": seed, "text": options.text, "device": options.device,
        "steps": options.steps, "peer-seconds": options.peer_seconds or 0,
    }  # fmt: skip
    found = run_alone("benchmarks.budgets", name, options=given)
    if "missing" in found:
        return {"missing": found["missing"]}
    curve: Curve = found["curve"]
    best = min(loss for _, loss in curve)
    return {"seed": seed, "seconds": curve[-1][0], "loss": best, "curve": curve}


def with_start_last(text: Path, folder: Path) -> Path:
    """Write the text with its first tenth moved to the end, where it is held out; return the file."""
    content = text.read_text(encoding="utf-8")
    tenth = len(content) // 10
    moved = folder / text.name
    moved.write_text(content[tenth:] + content[:tenth], encoding="utf-8")
    return moved


def draw(results: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Draw one curve of each contender, that of its first seed, over a logarithmic time."""
    from minigpt.evaluation.charts import render

    lowest = min(run["loss"] for runs in results.values() for run in runs)
    points = [
        {"contender": name, "seconds": seconds, "loss": loss}
        for name, runs in results.items()
        for seconds, loss in runs[0]["curve"]
        if loss < lowest + HEIGHT
    ]
    lines = {
        "data": {"values": points},
        "width": 560,
        "height": 320,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {
                "field": "seconds", "type": "quantitative", "scale": {"type": "log", "nice": False},
                "title": "seconds of training",
            },
            "y": {
                "field": "loss", "type": "quantitative", "scale": {"zero": False},
                "title": "validation loss (nats per character)",
            },
            "color": {
                "field": "contender", "type": "nominal", "title": None, "legend": {"labelLimit": 0},
                "scale": {"domain": list(results)},
            },
        },
    }  # fmt: skip
    render([[lines]], "Loss against the time of training", target)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profiles", nargs="*", default=PROFILES, help=f"default: {' '.join(PROFILES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="steps of each profile; default: its own number")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--held-out", choices=("end", "start"), default="end", help="the tenth of the text to hold out")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; none without a name"
    )
    parser.add_argument(
        "--peer-seconds", type=float, help="seconds that each peer trains; default: as the last profile"
    )
    parser.add_argument("--results", type=Path, default=Path("results") / "benchmarks", help="a folder")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    resolve_text(parser, options)
    if options.one is not None:
        (name,) = options.profiles
        who = next((key for key, peer_name in PEERS.items() if peer_name == name), None)
        try:
            curve = train_peer(who, options.peer_seconds, options) if who else train_profile(name, options.one, options)
        except ImportError as error:
            print(json.dumps({"missing": str(error)}))
        else:
            print(json.dumps({"curve": curve}))
        return

    results = describe_run("benchmarks.budgets", options.device)
    results |= {"text": options.text.name, "held_out": options.held_out, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        if options.held_out == "start":
            options.text = with_start_last(options.text, Path(folder))
        peers = [PEERS[who] for who in options.peers]
        for name, seeds in [(name, options.seeds) for name in options.profiles] + [(name, 1) for name in peers]:
            runs = [measure(name, seed, options) for seed in range(1, seeds + 1)]
            if "missing" in runs[0]:
                print(f"{name:50} not measured: {runs[0]['missing']}", flush=True)
                continue
            results["runs"][name] = runs
            losses = [run["loss"] for run in runs]
            spread = f"± {stdev(losses):.4f}" if len(losses) > 1 else ""
            seconds = mean(run["seconds"] for run in runs)
            print(f"{name:50} {seconds:6.1f} s  {mean(losses):.4f} {spread}", flush=True)
            if name == options.profiles[-1]:
                options.peer_seconds = options.peer_seconds or seconds
            # After each contender: a later one may fail.
            names = options.device.partition(":")[0], "budgets", options.text.stem, options.held_out
            written = save_results(options.results, results, *names)
            draw(results["runs"], written.with_name(f"{written.name}.png"))
    print(f"written to {written}.*")


if __name__ == "__main__":
    main()
