"""Run all benchmarks, or the named ones, and compare the project with its peers.

    python -m benchmarks                                   all measures, three rounds
    python -m benchmarks writing training --rounds 5       those whose names begin so
    python -m benchmarks --device cuda

Each measurement is a process of its own. Contenders take turns, so that a slow minute of the machine meets them
all; figures are medians. Prints a table; writes it as JSON and as a picture to ``--results``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import NANOGPT_LOSS, SHAKESPEARE, describe_run, resolve_text, run_alone, save_results
from benchmarks.contenders import MEASURES
from minigpt.evaluation.charts import COLORS, render

OURS = ("minigpt",)
"""Prefixes of the names of this project's contenders."""


def measure(name: str, contender: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in its own process."""
    given = {"device": options.device, "text": options.text, "loss": options.loss, "megabytes": options.megabytes}
    result: dict[str, Any] = run_alone("benchmarks.contenders", name, contender, options={"round": number} | given)
    return result


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure over the rounds, and all values of the main one."""
    if any("missing" in run for run in runs):
        return {"missing": next(run["missing"] for run in runs if "missing" in run)}
    names = sorted(set().union(*runs))
    medians = {name: median(run[name] for run in runs if name in run) for name in names}
    return {**medians, "values": [run["value"] for run in runs]}


def rows(name: str, found: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return rows of contender, median, ratio in favor of the project, and other figures, for one measure."""
    ours = next(iter(found.values())).get("value", math.nan)
    more_is_better = "per second" in name
    table = []
    for contender, figures in found.items():
        if "missing" in figures:
            table.append((contender, "-", "-", f"not measured: {figures['missing']}"))
            continue
        value = figures["value"]
        ratio = ours / value if more_is_better else value / ours
        others = {key: number for key, number in figures.items() if key not in ("value", "values")}
        notes = ", ".join(f"{key} {number:,.4g}" for key, number in others.items())
        table.append((contender, f"{value:,.4g}", f"{ratio:.3g}", notes))
    return table


def draw(results: dict[str, Any], target: Path) -> None:
    """Draw one bar per peer: how many times better the project is, on a logarithmic scale."""
    ratios: list[dict[str, Any]] = []
    for name, found in results["measures"].items():
        peers = [row for row in rows(name, found) if not row[0].startswith(OURS) and row[2] != "-"]
        ratios += [{"peer": f"{name.partition(',')[0]}: {row[0]}", "ratio": float(row[2])} for row in peers]
    ratios = [row for row in ratios if math.isfinite(row["ratio"])]
    if not ratios:
        return
    x = {"field": "ratio", "type": "quantitative", "title": "times better than the peer", "scale": {"type": "log"}}
    bars = {
        "data": {"values": ratios},
        "width": 400,
        "height": {"step": 26},
        "encoding": {"y": {"field": "peer", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 0}}},
        "layer": [
            # A bar starts at 1, where both are equally good.
            {"mark": {"type": "bar", "color": COLORS[0]}, "encoding": {"x": x, "x2": {"datum": 1}}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {"x": x, "text": {"field": "ratio", "format": ".3~g"}},
            },
        ],
    }
    render([[bars]], results["machine"]["device"], target)


def main() -> None:
    """Run the command line."""
    summary, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=summary, epilog=more, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measures", nargs="*", help="beginnings of: " + "; ".join(MEASURES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--loss", type=float, help=f"default: 1.88 on a CPU, {NANOGPT_LOSS} on a GPU")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the text that is encoded")
    parser.add_argument("--results", type=Path, default=Path("results") / "benchmarks", help="a folder")
    options = parser.parse_args()
    options.loss = options.loss or (NANOGPT_LOSS if options.device.startswith("cuda") else 1.88)
    chosen = [name for name in MEASURES if not options.measures or name.startswith(tuple(options.measures))]
    if not chosen:
        parser.error(f"no measure begins with {' or '.join(options.measures)}; there are {'; '.join(MEASURES)}")

    resolve_text(parser, options)

    results = describe_run("benchmarks", options.device)
    results |= {"text": options.text.name, "loss": options.loss, "measures": {}}
    for name in chosen:
        print(f"\n{name}", flush=True)
        runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in MEASURES[name]}
        for number in range(options.rounds):
            for contender, found in runs.items():
                if not any("missing" in run for run in found):
                    found.append(measure(name, contender, number, options))
        results["measures"][name] = {contender: middle(found) for contender, found in runs.items()}
        for contender, value, ratio, notes in rows(name, results["measures"][name]):
            print(f"  {contender:55} {value:>10}  x {ratio:>6}  {notes}", flush=True)
        written = save_results(options.results, results, options.device.partition(":")[0])

    draw(results, written.with_name(f"{written.name}.png"))
    print(f"\nwritten to {written}.*")


if __name__ == "__main__":
    main()
