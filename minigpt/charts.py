"""Pictures of a training, for the tracked run and for people."""

from __future__ import annotations

from pathlib import Path

INK, TRAIN, VAL = "#22223b", "#9a8c98", "#c1440e"


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
    axes.set(title=title, xlabel="step", ylabel="nats per character")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)
