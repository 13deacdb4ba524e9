"""The recipe with one change at a time, over several seeds: what each part of it is worth.

    python -m benchmarks.ablations                     every variant, seeds 1 to 3
    python -m benchmarks.ablations ema "tied head" --seeds 5

Losses are exact, on the validation split in windows that do not overlap; all variants read the same number of
characters. What the library has no switch for, because it does not pay, is built here.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    SHAKESPEARE,
    describe_run,
    prepared,
    profile,
    resolve_text,
    run_alone,
    save_results,
    trainer,
)

if TYPE_CHECKING:
    from minigpt.training.trainer import Trainer

BASE: dict[str, dict[str, Any]] = {
    "model": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 128,
        "block_size": 256,
        "attention_window": 64,
        "mlp_conv": 1,
        "dropout": 0.0,
    },
    "train": {
        "max_iters": 300,
        "batch_size": 8,
        "eval_interval": 300,
        "token_noise": 0.0,
        "temperature": 1.0,
        "device": "cpu",
    },
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "the recipe": {},
    "full attention": {"model": {"attention_window": 0}},
    "context 128": {"model": {"block_size": 128}, "train": {"batch_size": 16}},
    "context 512": {"model": {"block_size": 512}, "train": {"batch_size": 4}},
    "no convolution": {"model": {"embd_conv": 1}},
    "convolution over feed-forward inputs": {"model": {"mlp_conv": 4}},
    "relu": {"model": {"activation": "relu"}},
    "learned positions": {"model": {"positions": "learned"}},
    "no norm on queries and keys": {"model": {"qk_norm": False}},
    "tied head": {"model": {"tied_head": True}},
    "dropout 0.05, channels": {"model": {"dropout": 0.05}},
    "dropout 0.05, elements": {"model": {"dropout": 0.05, "dropout_kind": "element"}},
    "token noise 0.03": {"train": {"token_noise": 0.03}},
    "cosine": {"train": {"schedule": "cosine"}},
    "AdamW 3e-3": {"train": {"optimizer": "adamw", "learning_rate": 3e-3}},
    "ema": {},
    "ema, constant rate": {"train": {"schedule": "constant"}},
    "growing batch": {},
    "batches of 6": {"train": {"batch_size": 6, "max_iters": 400, "eval_interval": 400}},
    "rows of equal norm": {"train": {"row_norm": True}},
    "batches of 6, rows of equal norm": {
        "train": {"batch_size": 6, "max_iters": 400, "eval_interval": 400, "row_norm": True}
    },
    "swiglu": {"model": {"activation": "swiglu", "mlp_ratio": 8 / 3}},
}
EMA = 0.98
"""Decay of the averaged weights, by step; about the last 50 count."""


def built(name: str, seed: int, text: Path) -> Trainer:
    """Return the trainer of a variant."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from minigpt.training.trainer import Trainer

    class Averaging(Trainer):
        """Trainer that evaluates a mean of the weights over the last steps."""

        mean: list[Tensor] | None = None

        def train_step(self, step: int, request: int = 0) -> Tensor:
            values = super().train_step(step, request)
            weights = [p.detach() for p in self.model.parameters()]
            if self.mean is None:
                self.mean = [p.clone() for p in weights]
            torch._foreach_lerp_(self.mean, weights, 1 - min(EMA, (step + 1) / (step + 10)))
            return values

        def evaluate(self, step: int) -> None:
            weights = [p.detach() for p in self.model.parameters()]
            kept = [p.clone() for p in weights]
            if self.mean is not None:
                torch._foreach_copy_(weights, self.mean)
            super().evaluate(step)
            torch._foreach_copy_(weights, kept)

    class Growing(Trainer):
        """Trainer whose batch grows from 0.4 to 1.6 of its size; the run reads the usual number of windows."""

        def accumulate_gradient(self, step: int) -> Tensor:
            size, steps = self.train.batch_size, self.train.max_iters
            first, after = (int(size * (0.4 * n + 0.6 * n * n / steps)) for n in (step, step + 1))
            batch = self.corpus.train.batch(self.train.seed, first, max(1, after - first), self.block_size)
            loss = F.cross_entropy(self.logits(batch[0]).flatten(0, 1), batch[1].flatten())
            loss.backward()
            return loss.detach()

    changes = VARIANTS[name]
    merged = {section: BASE[section] | changes.get(section, {}) for section in BASE}
    merged["train"] |= {"seed": seed}
    params = profile("shakespeare-cpu", **merged)
    corpus = prepared(argparse.Namespace(text=text, device="cpu"))
    kind = {"ema": Averaging, "ema, constant rate": Averaging, "growing batch": Growing}.get(name, Trainer)
    return trainer(params, corpus, kind=kind)


def measure(name: str, seed: int, text: Path) -> dict[str, float]:
    """Train a variant in a process of its own, on one thread."""
    given = {"one": seed, "text": text}
    result: dict[str, float] = run_alone("benchmarks.ablations", name, options=given, OMP_NUM_THREADS="1")
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("variants", nargs="*", help="; ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="concurrent trainings, one thread each")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--results", type=Path, default=Path("results") / "benchmarks")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"no variant {unknown.pop()!r}; there are: {'; '.join(VARIANTS)}")
    resolve_text(parser, options)
    if options.one is not None:
        outcome = built(options.variants[0], options.one, options.text).run()
        print(json.dumps({key: outcome.metrics[key] for key in ("val_loss", "train_loss", "parameters")}))
        return

    names, seeds = options.variants or list(VARIANTS), range(1, options.seeds + 1)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {name: [pool.submit(measure, name, seed, options.text) for seed in seeds] for name in names}
        results = {name: [one.result() for one in runs] for name, runs in waiting.items()}
    ours = mean(run["val_loss"] for run in results.get("the recipe", [{"val_loss": float("nan")}]))
    for name, runs in sorted(results.items(), key=lambda found: mean(run["val_loss"] for run in found[1])):
        losses = [run["val_loss"] for run in runs]
        spread = f"± {stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{name:38} {mean(losses):.4f} {spread}  {mean(losses) - ours:+.4f}")
    facts = describe_run("benchmarks.ablations", "cpu") | {"text": options.text.name, "base": BASE}
    print(f"written to {save_results(options.results, facts | {'runs': results}, 'cpu', 'ablations')}.json")


if __name__ == "__main__":
    main()
