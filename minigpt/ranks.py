"""The processes of one job: what torchrun says of them, their device, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from minigpt.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job.

    Attributes:
        rank: this process, in [0, world).
        world: how many processes there are.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files, tracks and talks."""
        return self.rank == 0

    def micro_batches(self, grad_accum: int) -> range:
        """The micro-batches of a step that are this process's, of ``grad_accum`` over all processes."""
        return range(self.rank, grad_accum, self.world)

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, or, with several processes, one that averages gradients over them (DDP)."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def any(self, value: int) -> int:
        """The greatest of the processes' values: whether any says yes, the same answer in all."""
        if self.world == 1:
            return value
        greatest = torch.tensor(value, device=self.device)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return int(greatest.item())


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for ``train.device``: ``auto`` is a CUDA device when there is one, else the CPU.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or local_rank)
        if index >= count:
            raise UserError(f"train.device: {name} is asked for, but {count} CUDA devices are here; set it to auto")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of activations for ``train.dtype``; None for that of the weights, float32.

    ``auto`` is bfloat16 on a GPU and on processors that multiply it in hardware.
    """
    if name == "auto":
        on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else on_cpu
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if name == "bfloat16" else None


@contextmanager
def join(device: str, grad_accum: int) -> Iterator[Ranks]:
    """Take this process's place in the job that torchrun started, or be a job of one.

    Args:
        device: ``train.device``.
        grad_accum: micro-batches of a step, which the processes share equally.

    Raises:
        UserError: the processes cannot share the micro-batches, or the device is absent.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if grad_accum % world:
        raise UserError(f"train.grad_accum: {grad_accum} micro-batches cannot be shared equally by {world} processes")
    ranks = Ranks(rank, world, choose_device(device, int(os.environ.get("LOCAL_RANK", "0"))))
    if world == 1:
        yield ranks
        return
    distributed.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo")
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()
