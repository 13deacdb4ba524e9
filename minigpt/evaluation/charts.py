"""Pictures of a training and of its evaluation, for the tracked run and for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minigpt.evaluation.breakdown import Breakdown

Fonts = dict[str, set[int]]
"""The code points that fonts have, by their names."""

INK, TRAIN, VAL = "#22223b", "#9a8c98", "#c1440e"

FONTS = (
    "DejaVu Sans", "Noto Sans Devanagari", "Lohit Devanagari", "Kohinoor Devanagari", "Nirmala UI", "Mangal",
    "FreeSans", "Noto Sans", "Arial Unicode MS", "Unifont",
)  # fmt: skip
"""What characters are drawn in, the first that has them; matplotlib brings only the first."""

NAMED = 100
"""Characters that have their name beside them in a picture, the most frequent."""


def loss(history: list[dict[str, float]], title: str, target: Path) -> None:
    """Draw both losses over the steps, the best one marked.

    Args:
        history: rows with ``step``, ``train_loss`` and ``val_loss`` in nats per character.
        title: stands above.
        target: a file name; its ending chooses the format.
    """
    from matplotlib.figure import Figure

    steps = [row["step"] for row in history]
    best = min(history, key=lambda row: row["val_loss"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["train_loss"] for row in history], color=TRAIN, label="training")
    axes.plot(steps, [row["val_loss"] for row in history], color=VAL, label="validation")
    axes.plot(best["step"], best["val_loss"], "o", color=VAL)
    axes.annotate(
        f"best: {best['val_loss']:.4f} at step {best['step']:,.0f}",
        (best["step"], best["val_loss"]),
        xytext=(-6, 14),
        textcoords="offset points",
        ha="right",
        color=INK,
    )
    _dress(axes, title, "step", "nats per character")
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


def evaluation(report: Breakdown, compared: list[dict[str, Any]], title: str, target: Path) -> None:
    """Draw the tables of an evaluation.

    Args:
        report: of the validation split.
        compared: rows with ``model`` and ``loss``; the first is the model of the report.
        title: stands above.
        target: a file name; its ending chooses the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fonts = _fonts()
    pairs = [
        {**row, "pair": f"{_drawn(row['target'], fonts)} as {_drawn(row['guess'], fonts)}"}
        for row in report.confusions()[:15]
    ]
    with rc_context({"font.family": list(fonts)}):
        figure = Figure(figsize=(13, 8), layout="constrained")
        figure.suptitle(title, parse_math=False)
        grid = figure.add_gridspec(2, 3)
        _bars(figure.add_subplot(grid[0, 0]), compared, "model", "loss", title="Beside counting, nats", form="{:.3f}")
        _positions(figure.add_subplot(grid[0, 1]), report)
        _calibration(figure.add_subplot(grid[0, 2]), report)
        _characters(figure.add_subplot(grid[1, :2]), report, fonts)
        _bars(figure.add_subplot(grid[1, 2]), pairs, "pair", "count", title="Most confused pairs, times", form="{:,}")
        figure.savefig(target, dpi=120)


def _bars(axes: Axes, rows: list[dict[str, Any]], name: str, value: str, *, title: str, form: str) -> None:
    values = [row[value] for row in rows]
    colors = [VAL, *[TRAIN] * (len(rows) - 1)] if name == "model" else TRAIN
    bars = axes.barh(range(len(rows)), values, color=colors)
    axes.bar_label(bars, [f" {form.format(number)}" for number in values], color=INK, fontsize=8)
    axes.set_yticks(range(len(rows)), [row[name] for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _dress(axes, title, "", "")


def _positions(axes: Axes, report: Breakdown) -> None:
    rows = report.positions()
    axes.plot([row["position"] for row in rows], [row["loss"] for row in rows], color=VAL, linewidth=1)
    axes.set_xscale("log")
    _dress(axes, "Loss by position", "characters of context", "nats per character")


def _calibration(axes: Axes, report: Breakdown) -> None:
    rows = report.calibration()
    axes.plot([0, 1], [0, 1], color=TRAIN, linestyle=":")
    axes.plot([row["predicted"] for row in rows], [row["observed"] for row in rows], "o-", color=VAL)
    title = f"Calibration: error {report.calibration_error:.4f}"
    _dress(axes, title, "probability of the likeliest character", "how often it came")


def _characters(axes: Axes, report: Breakdown, fonts: Fonts) -> None:
    rows = report.characters()
    axes.scatter([row["count"] for row in rows], [row["loss"] for row in rows], color=TRAIN, s=8)
    for row in rows[:NAMED]:
        name = _drawn(row["character"], fonts)
        place = (row["count"], row["loss"])
        axes.annotate(name, place, (2, 2), textcoords="offset points", color=INK, parse_math=False)
    axes.set_xscale("log")
    _dress(axes, "Loss by character", "how often it occurs", "nats")


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _fonts() -> Fonts:
    """Those of FONTS that are installed."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    installed = set(fontManager.get_font_names())
    return {name: set(get_font(findfont(name)).get_charmap()) for name in FONTS if name in installed}


def _drawn(name: str, fonts: Fonts) -> str:
    """``name``, or the code point of its last character where no font has one of its characters."""
    has_all = all(any(ord(character) in known for known in fonts.values()) for character in name)
    return name if has_all else f"U+{ord(name[-1]):04X}"
