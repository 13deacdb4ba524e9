"""The processes of one job: their places, their devices, what each holds of the model, and sums over all of them.

torchrun starts them, or :mod:`minigpt.launcher` with torchrun's own agent; both say who is who in the environment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minigpt.errors import PeerLostError, UserError
from minigpt.runtime.device import choose_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from minigpt.model import GPT

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds that a process waits for the others before it gives them up; MINIGPT_PEER_SECONDS goes before.

It must be longer than the first process takes to write a checkpoint, for which the others wait.
"""

GLOO = "gloo/"
"""What errors say, in a path, when another process failed on a CPU; those of NCCL and the store have a class."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of its job.

    Attributes:
        rank: this process, in [0, world).
        world: how many processes there are.
        device: where this process computes.
        sharded: each holds a part of every weight (FSDP2), not all of them (DDP).
    """

    rank: int
    world_size: int
    device: torch.device
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files, tracks and talks."""
        return self.rank == 0

    def micro_batches(self, grad_accum: int) -> range:
        """The micro-batches of a step that are this process's, of ``grad_accum`` over all processes."""
        return range(self.rank, grad_accum, self.world_size)

    def wrap(self, model: GPT) -> nn.Module:
        """``model`` on the device, and, with several processes, so that gradients are averaged over them.

        A sharded model keeps its class, and is sharded in place, block by block: only one block at a time is whole.
        """
        if self.world_size == 1:
            return model.to(self.device)
        if not self.sharded:
            with warnings.catch_warnings():  # older torch does not know the argument's new name
                warnings.simplefilter("ignore", FutureWarning)
                return nn.parallel.DistributedDataParallel(model.to(self.device), broadcast_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy()
        if model.compute_dtype and not model.config.norm_affine:
            # A block's maps compute in this dtype anyhow; put together in it, they are half the traffic.
            policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        return model

    def no_sync(self, parallel: nn.Module, skip: bool) -> AbstractContextManager[None]:
        """Leave gradients to themselves inside, where ``unsynced``: a later micro-batch will average their sum."""
        if self.world_size == 1:
            return nullcontext()
        if self.sharded:
            parallel.set_requires_gradient_sync(not skip)  # type: ignore[operator]
            return nullcontext()
        return parallel.no_sync() if skip else nullcontext()  # type: ignore[operator]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """The greatest of the processes' values: whether any says yes, the same answer in all."""
        if self.world_size == 1:
            return value
        greatest = torch.tensor(value, device=self.device)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return int(greatest.item())

    def grad_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which each process of a sharded model gives its parts."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return self.all_reduce_sum(norm * norm).sqrt() if self.sharded else norm

    def broadcast_object(self, value: T) -> T:
        """The first process's ``value``, in all."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return cast("T", values[0])

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with the first process's, in all."""
        for tensor in tensors if self.world_size > 1 else ():
            here = tensor.to(self.device)
            distributed.broadcast(here, src=0)
            tensor.copy_(here)

    def pad_to_longest(self, items: Iterable[T]) -> Iterator[T | None]:
        """The items; of a sharded model's process, as many in each: None stands for what it has less than another.

        Every process must compute as often as the others: each time, they put the weights together.
        """
        if not self.sharded:
            yield from items
            return
        own = iter(items)
        while True:
            item = next(own, None)
            if not self.all_reduce_max(item is not None):
                return
            yield item


SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))
"""A job of one process, where no device matters."""


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of its part if it is sharded, else all of it."""
    return cast("DTensor", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, sharded as ``like`` is, of which ``part`` is here; of a tensor that is not sharded, ``part``."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    mesh, shards = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return DTensor.from_local(part, mesh, shards, run_check=False, shape=like.shape, stride=like.stride())


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, put together from its parts; every process must ask for it."""
    return cast("DTensor", tensor.detach()).full_tensor() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this process would hold if it were sharded as ``like`` is."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, shards = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return distribute_tensor(tensor, mesh, shards, src_data_rank=None).to_local()


@contextmanager
def join_process_group(device: str, grad_accum: int, parallel: str = "ddp") -> Iterator[ProcessGroup]:
    """Take this process's place in the job that torchrun started, or be a job of one.

    Args:
        device: ``train.device``.
        grad_accum: micro-batches of a step, which the processes share equally.
        parallel: ``train.parallel``: ddp or fsdp.

    Raises:
        UserError: the processes cannot share the micro-batches, or the device is absent.
        PeerLostError: another process has failed, or can no longer be reached.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if grad_accum % world:
        raise UserError(
            f"train.grad_accum: {grad_accum} micro-batches cannot be shared equally by {world} processes; "
            f"set it to a multiple of {world}"
        )
    if world == 1:
        yield ProcessGroup(0, 1, choose_device(device))
        return
    if ":" in device:
        raise UserError(f"train.device: {device} is one device, for {world} processes; set it to cuda")
    here = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(seconds=float(os.environ.get("MINIGPT_PEER_SECONDS", PATIENCE)))
    cuda = here.type == "cuda"
    try:
        store = next(rendezvous("env://", timeout=patience))[0]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # The agent gives a restarted job the store in which the dead ones' addresses still are.
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=patience,
            device_id=here if cuda else None,
        )
        yield ProcessGroup(rank, world, here, parallel == "fsdp")
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or GLOO in str(error):
            raise PeerLostError(str(error).strip().splitlines()[0]) from error
        raise
    # Not after an error: with NCCL it would wait for those that are gone.
    distributed.destroy_process_group()
