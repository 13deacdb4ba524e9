"""Optimizers: AdamW, Muon, and the learning rate as a pure function of the step."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.choices import SCHEDULES
from minigpt.model import GPT
from minigpt.params import TrainParams
from minigpt.runtime.distributed import from_local, full_tensor, shard_like, to_local

MAX_BATCH_ELEMENTS = 1 << 26  # orthogonalized in one batch, unless a single matrix has more


def learning_rate(step: int, train: TrainParams) -> float:
    """Return the learning rate of ``step`` (from 0) as a fraction of its peak: linear warm-up, then the schedule."""
    if step < train.warmup_iters:
        return (step + 1) / train.warmup_iters
    done = (step - train.warmup_iters) / max(1, train.max_iters - train.warmup_iters)
    left = SCHEDULES[train.schedule](done)
    return train.final_lr_fraction + (1 - train.final_lr_fraction) * left


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return nearly orthogonal matrices near ``matrices`` (batch, rows, columns), by Newton-Schulz iteration.

    Its five steps bring most singular values into about [0.7, 1.2]. Those far below the largest stay smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # a quintic that drives singular values towards 1 (Jordan et al. 2024, "Muon")
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class EagerOptimizer(torch.optim.Optimizer):
    """Optimizer that is never compiled."""

    # torch's versions import torch._dynamo, which takes as long as importing torch.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, without the decorators that prepare it for torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(EagerOptimizer):
    """Momentum with orthogonalized updates: each matrix moves equally far in all directions (Jordan et al. 2024).

    Matrices of one shape are orthogonalized as one batch. For a sharded model, each rank keeps the momentum of its
    shards; the matrices are gathered batch by batch, and every rank orthogonalizes them.

    Args:
        matrices: 2D parameters, each with the number of equal linear maps stacked in its rows. Each map is
            orthogonalized separately.
        momentum: decay of the mean of gradients (Nesterov).
        weight_decay: per unit of learning rate.
        row_norm: give each row of an update, the weights of one output, a norm of 1 (Li et al. 2025, "NorMuon", without
            its mean over steps). Rows of an orthogonal matrix with more rows than columns differ in norm.
        dtype: dtype of the Newton-Schulz iteration.
    """

    found_inf: Tensor | None = None
    """As in torch's own optimizers: a tensor on the device; if it is not 0, a step changes no parameter."""

    def __init__(
        self,
        matrices: list[tuple[Tensor, int]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        row_norm: bool,
        dtype: torch.dtype,
    ) -> None:
        self._matrices, self._row_norm, self._dtype = matrices, row_norm, dtype
        own = [to_local(matrix) for matrix, _ in self._matrices]
        super().__init__(own, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for p in own:
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
            if group["weight_decay"]:
                decay = group["lr"] * group["weight_decay"]
                if self.found_inf is not None:
                    decay = decay * (~self.found_inf.bool()).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - decay)
            torch._foreach_add_(params, directions, alpha=-group["lr"])

    def _orthogonalized(self, updates: list[Tensor]) -> list[Tensor]:
        """Return orthogonalized updates, or 0 if the gradient is not finite.

        A map's rows have a norm of about 1: its update is multiplied by sqrt(max(1, rows / columns)), or normalized.
        """
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, (matrix, maps) in enumerate(self._matrices):
            shapes.setdefault((matrix.size(0), matrix.size(1), maps), []).append(index)
        result = list(updates)
        for (height, columns, maps), alike in shapes.items():
            rows, size = height // maps, max(1, MAX_BATCH_ELEMENTS // (height * columns))
            for members in (alike[first : first + size] for first in range(0, len(alike), size)):
                own = [from_local(updates[index], self._matrices[index][0]) for index in members]
                stacked = torch.stack([full_tensor(update) for update in own]).to(self._dtype)
                batch = orthogonalize(stacked.view(-1, rows, columns))
                dtype, scale = updates[members[0]].dtype, max(1, rows / columns) ** 0.5
                batch = F.normalize(batch.to(dtype), dim=-1) if self._row_norm else batch * scale
                # Contiguous, so that one fused kernel adds all updates to the weights.
                batch = batch.reshape(-1, height, columns).to(dtype).contiguous()
                if self.found_inf is not None:
                    batch = torch.where(self.found_inf.bool(), 0, batch)
                for index, direction in zip(members, batch.unbind(), strict=True):
                    result[index] = shard_like(direction, self._matrices[index][0])
        return result


class Optimizers:
    """All optimizers of a model, used as one. For a sharded model, they hold and update this rank's shards.

    ``dtype`` is that of Muon's Newton-Schulz iteration.
    """

    def __init__(self, model: GPT, train: TrainParams, dtype: torch.dtype) -> None:
        self.train = train
        self.all: list[torch.optim.Optimizer] = []
        # From the tensors that the optimizers update, on this rank, to the model's parameters.
        self._weights: dict[Tensor, Tensor] = {}
        params = list(model.parameters())
        if train.optimizer == "muon":
            matrices = list(model.matrices())
            muon = Muon(
                matrices,
                lr=train.learning_rate,
                momentum=train.momentum,
                weight_decay=train.weight_decay,
                row_norm=train.row_norm,
                dtype=dtype,
            )
            self.all.append(muon)
            self._weights |= zip(muon.param_groups[0]["params"], (matrix for matrix, _ in matrices), strict=True)
            rest = [p for p in params if p not in set(self._weights.values())]
            parts = [(rest, train.adam_learning_rate, 0.0)]
        else:
            decayed, others = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
            parts = [(decayed, train.learning_rate, train.weight_decay), (others, train.learning_rate, 0.0)]
        groups: list[dict[str, Any]] = []
        for weights, lr, weight_decay in parts:
            own = {to_local(p): p for p in weights}
            self._weights |= own
            if own:
                groups.append({"params": list(own), "lr": lr, "weight_decay": weight_decay})
        adam = AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True)
        self.all.append(adam)
        # AdamW makes this state in its first step. Make it now, so that a checkpoint always has the same tensors.
        for p in (p for group in groups for p in group["params"]):
            means = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[p] = {"step": torch.zeros((), device=p.device, dtype=torch.float32), **means}
        self._groups = [group for optimizer in self.all for group in optimizer.param_groups]
        for group in self._groups:
            group["peak"] = group["lr"]

    def step(self, step: int, found_inf: Tensor | None = None) -> None:
        """Update the weights with the learning rate of ``step``, unless ``found_inf``, on the device, is not 0."""
        fraction = learning_rate(step, self.train)
        for group in self._groups:
            group["lr"] = group["peak"] * fraction
        for own, weight in self._weights.items():
            if own is not weight:
                own.grad = None if weight.grad is None else to_local(weight.grad)
        for optimizer in self.all:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by stable names such as ``0.12.exp_avg``, each tensor sharded like its weight."""
        tensors = {}
        for number, optimizer in enumerate(self.all):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    like = self._weights[own[index]] if value.ndim else value
                    tensors[f"{number}.{index}.{name}"] = from_local(value, like)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the state that :meth:`tensors` returned."""
        for name, value in self.tensors().items():
            to_local(value).copy_(to_local(tensors[name]))
