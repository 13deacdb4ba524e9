"""Which parameter is updated how: AdamW, Muon, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minigpt.model import GPT
from minigpt.params import Train

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that drives singular values towards 1 (Jordan et al. 2024, "Muon")."""


def learning_rate(step: int, train: Train) -> float:
    """The learning rate of ``step`` (from 0) as a share of its peak: warm-up, then the schedule down to final_lr."""
    if step < train.warmup_iters:
        return (step + 1) / train.warmup_iters
    if train.schedule == "constant":
        return 1.0
    done = (step - train.warmup_iters) / max(1, train.max_iters - train.warmup_iters)
    left = 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return train.final_lr + (1 - train.final_lr) * left


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with singular values near 1, by Newton-Schulz iteration.

    Args:
        matrices: (..., rows, columns), in the dtype to compute in.
        steps: iterations; five bring every singular value into about [0.7, 1.2].

    Returns:
        the same shape and dtype.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by the same amount in all its directions (Jordan et al. 2024).

    Matrices of one shape are orthogonalised together, in one batch.

    Args:
        matrices: parameters of two dimensions, each with the number of equal maps stacked in its rows, which are
            orthogonalised apart.
        lr: learning rate.
        momentum: decay of the mean of gradients, with Nesterov's look ahead.
        weight_decay: per unit of learning rate.
        dtype: what Newton-Schulz is computed in.

    Attributes:
        found_inf: as torch's own optimizers have it: a tensor on the device; where it is not 0, a step changes no
            parameter.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Iterable[tuple[Tensor, int]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        pairs = list(matrices)
        self._parts = [parts for _, parts in pairs]
        self._dtype = dtype
        super().__init__([p for p, _ in pairs], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for p, _ in pairs:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            grads = [p.grad for p in params if p.grad is not None]
            means = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            directions = self._orthogonalized(list(torch._foreach_lerp(grads, means, group["momentum"])))
            if self.found_inf is not None:
                bad = self.found_inf.bool()
                directions = [torch.where(bad, 0, direction) for direction in directions]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * (~bad).to(params[0].dtype))
            elif group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])

    def _orthogonalized(self, updates: list[Tensor]) -> list[Tensor]:
        """The updates as :func:`orthogonalize` makes them, scaled by sqrt(max(1, rows / columns))."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, (update, parts) in enumerate(zip(updates, self._parts, strict=True)):
            shapes.setdefault((update.size(0) // parts, update.size(1), update.size(0)), []).append(index)
        result = list(updates)
        for (rows, columns, height), members in shapes.items():
            stacked = torch.stack([updates[index] for index in members]).to(self._dtype)
            batch = orthogonalize(stacked.view(-1, rows, columns)) * max(1, rows / columns) ** 0.5
            batch = batch.view(-1, height, columns).to(updates[members[0]].dtype)
            for index, direction in zip(members, batch.unbind(), strict=True):
                result[index] = direction
        return result


class Optimizers:
    """The optimizers of a model, stepped as one.

    Args:
        model: what is trained.
        train: the section ``train`` of the params.
        dtype: of Muon's iteration.
    """

    def __init__(self, model: GPT, train: Train, dtype: torch.dtype) -> None:
        self.train = train
        betas = (train.beta1, train.beta2)
        self.all: list[torch.optim.Optimizer] = []
        if train.optimizer == "muon":
            matrices = {p for p, _ in model.matrices()}
            rest = [p for p in model.parameters() if p not in matrices]
            self.all.append(Muon(model.matrices(), train.learning_rate, train.momentum, train.weight_decay, dtype))
            groups: list[dict[str, Any]] = [{"params": rest, "lr": train.adam_learning_rate, "weight_decay": 0.0}]
        else:
            decayed = [p for p in model.parameters() if p.ndim >= 2]
            others = [p for p in model.parameters() if p.ndim < 2]
            groups = [
                {"params": decayed, "lr": train.learning_rate, "weight_decay": train.weight_decay},
                {"params": others, "lr": train.learning_rate, "weight_decay": 0.0},
            ]
        groups = [group for group in groups if group["params"]]
        self.all.append(torch.optim.AdamW(groups, betas=betas, eps=train.epsilon, fused=True))
        for group in self._groups():
            group["peak"] = group["lr"]

    def step(self, step: int, found_inf: Tensor | None = None) -> None:
        """Update the weights at the learning rate of ``step``; not where ``found_inf``, on the device, is not 0."""
        share = learning_rate(step, self.train)
        for group in self._groups():
            group["lr"] = group["peak"] * share
        for one in self.all:
            one.found_inf = found_inf  # type: ignore[attr-defined]
            one.step()

    def _groups(self) -> Iterator[dict[str, Any]]:
        for one in self.all:
            yield from one.param_groups

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by a name that stays the same: ``0.12.exp_avg``."""
        return {
            f"{number}.{index}.{name}": value
            for number, one in enumerate(self.all)
            for index, state in one.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for number, one in enumerate(self.all):
            state = one.state_dict()
            state["state"] = {}
            for key, value in tensors.items():
                which, index, name = key.split(".")
                if int(which) == number:
                    state["state"].setdefault(int(index), {})[name] = value
            one.load_state_dict(state)
