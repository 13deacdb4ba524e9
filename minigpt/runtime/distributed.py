"""Process group of a distributed job: data-parallel wrapping, collectives, and sharded tensors.

torchrun starts the processes, or :mod:`minigpt.runtime.launcher` does with torchrun's agent. Both describe the job in
environment variables (RANK, WORLD_SIZE and so on).
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

T = TypeVar("T")

PEER_TIMEOUT = 300.0
"""Seconds that a process waits for the others before it fails. Overridden by MINIGPT_PEER_SECONDS.

It must exceed the time in which rank 0 writes a checkpoint, because the others wait for that.
"""

GLOO_ERROR = "gloo/"
"""Part of a source path in gloo's errors, which have no class of their own. Errors of NCCL and of the store do."""


@dataclass(frozen=True)
class ProcessGroup:
    """Process of a distributed job, and its collectives.

    Attributes:
        rank: this process, in [0, world_size).
        world_size: number of processes.
        device: the device on which this process computes.
        sharded: each process holds a shard of every weight (FSDP2) instead of all weights (DDP).
    """

    rank: int
    world_size: int
    device: torch.device
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files, tracks the run and prints."""
        return self.rank == 0

    def micro_batches(self, grad_accum: int) -> range:
        """Return this process's micro-batches of a step, which has ``grad_accum`` over all processes."""
        return range(self.rank, grad_accum, self.world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move ``model`` to the device; with several processes, average its gradients over them.

        Sharding needs the attributes ``blocks``, ``compute_dtype`` and ``config``. The model keeps its class, and is
        sharded in place, block by block, so that only one block at a time is gathered.
        """
        if self.world_size == 1:
            return model.to(self.device)
        if not self.sharded:
            with warnings.catch_warnings():  # torch 2.13 deprecates an argument whose new name torch 2.12 rejects
                warnings.simplefilter("ignore", FutureWarning)
                return nn.parallel.DistributedDataParallel(model.to(self.device), broadcast_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy, gpt = MixedPrecisionPolicy(), cast("Any", model)
        if gpt.compute_dtype and not gpt.config.norm_affine:
            # A block's linear layers compute in this dtype anyway, and gathering them in it halves the traffic.
            policy = MixedPrecisionPolicy(param_dtype=gpt.compute_dtype, reduce_dtype=torch.float32)
        for block in gpt.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        return model

    def no_sync(self, parallel: nn.Module, skip: bool) -> AbstractContextManager[None]:
        """Return a context that, if ``skip``, leaves averaging the gradients to a later micro-batch."""
        if self.world_size == 1:
            return nullcontext()
        if self.sharded:
            parallel.set_requires_gradient_sync(not skip)  # type: ignore[operator]
            return nullcontext()
        return parallel.no_sync() if skip else nullcontext()  # type: ignore[operator]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the greatest value of all processes; for truth values, whether any is true."""
        if self.world_size == 1:
            return value
        greatest = torch.tensor(value, device=self.device)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return int(greatest.item())

    def grad_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the full gradient; with a sharded model, ``gradients`` are this process's shards."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return self.all_reduce_sum(norm * norm).sqrt() if self.sharded else norm

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's ``value`` in every process."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return cast("T", values[0])

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` in every process with those of rank 0."""
        for tensor in tensors if self.world_size > 1 else ():
            on_device = tensor.to(self.device)
            distributed.broadcast(on_device, src=0)
            tensor.copy_(on_device)

    def pad_to_longest(self, items: Iterable[T]) -> Iterator[T | None]:
        """Yield the items; with a sharded model, pad them with None so that every process iterates equally often.

        A sharded model needs that because every forward pass gathers its weights from all processes.
        """
        if not self.sharded:
            yield from items
            return
        iterator = iter(items)
        while True:
            item = next(iterator, None)
            if not self.all_reduce_max(item is not None):
                return
            yield item


SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))
"""Process group of size 1, for code in which the device does not matter."""


def to_local(tensor: Tensor) -> Tensor:
    """Return a view of this process's shard of a sharded tensor, and any other tensor unchanged."""
    return cast("DTensor", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor


def from_local(shard: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that is sharded as ``like`` and has this shard in this process; without shards, ``shard``."""
    if not hasattr(like, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes; every process must call this."""
    return cast("DTensor", tensor.detach()).full_tensor() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of a full tensor that this process holds if the tensor is sharded as ``like``."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


@contextmanager
def join_process_group(device: str, grad_accum: int, parallel: str = "ddp") -> Iterator[ProcessGroup]:
    """Join the job that torchrun started; without torchrun, yield a group of one process.

    Args:
        device: ``train.device``.
        grad_accum: micro-batches per step over all processes, a multiple of the number of processes.
        parallel: ``train.parallel``, ddp or fsdp.

    Raises:
        UserError: the processes cannot share the micro-batches equally, or the device is not available.
        PeerLostError: another process has failed or cannot be reached.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if grad_accum % world_size:
        raise UserError(
            f"train.grad_accum: {grad_accum} micro-batches cannot be shared equally by {world_size} processes; "
            f"set it to a multiple of {world_size}"
        )
    if world_size == 1:
        yield ProcessGroup(0, 1, choose_device(device))
        return
    if ":" in device:
        raise UserError(f"train.device: {device} is a single device, but there are {world_size} processes; use cuda")
    own_device = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=float(os.environ.get("MINIGPT_PEER_SECONDS", PEER_TIMEOUT)))
    cuda = own_device.type == "cuda"
    try:
        store = next(rendezvous("env://", timeout=timeout))[0]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun's agent keeps its store over restarts, and the store still has the addresses of dead processes.
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=own_device if cuda else None,
        )
        yield ProcessGroup(rank, world_size, own_device, parallel == "fsdp")
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or GLOO_ERROR in str(error):
            raise PeerLostError(str(error).strip().splitlines()[0]) from error
        raise
    # Not after an error, because NCCL would wait for processes that no longer exist.
    distributed.destroy_process_group()
