"""Process group of a distributed job: data-parallel wrapping, collectives, and sharded tensors.

torchrun starts the processes, or :mod:`minigpt.runtime.launcher` does with torchrun's agent. Both describe the job in
environment variables (RANK, WORLD_SIZE and so on).
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minigpt.errors import PeerLostError, UserError, environment_integer, environment_number
from minigpt.runtime.device import choose_device

T = TypeVar("T")


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

    def wrap(self, model: Any) -> nn.Module:
        """Move ``model`` to the device; with several processes, average its gradients over them.

        A model is sharded in place, and by blocks so that only one block at a time is gathered. Sharding needs its
        attributes ``blocks``, ``compute_dtype`` and ``config``.
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
        policy = MixedPrecisionPolicy()
        if model.compute_dtype and not model.config.norm_affine:
            # A block's linear layers compute in this dtype anyway, and gathering them in it halves the traffic. Its
            # inputs are not cast: the block would write to a copy of the KV cache.
            policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        return model

    def no_sync(self, parallel: nn.Module, skip: bool) -> AbstractContextManager[None]:
        """Return a context that, if ``skip``, leaves averaging the gradients to a later micro-batch."""
        if self.sharded:
            parallel.set_requires_gradient_sync(not skip)  # type: ignore[operator]
        elif skip and self.world_size > 1:
            return parallel.no_sync()  # type: ignore[operator]
        return nullcontext()

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
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

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
        item = next(iterator, None)
        while self.all_reduce_max(item is not None):
            yield item
            item = next(iterator, None)


SINGLE_PROCESS = ProcessGroup(0, 1, torch.device("cpu"))  # for code in which the device does not matter


def to_local(tensor: Tensor) -> Tensor:
    """Return a view of this process's shard of a sharded tensor, and any other tensor unchanged."""
    return cast("Any", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor


def from_local(shard: Tensor, like: Any) -> Tensor:
    """Return the tensor that is sharded as ``like`` and has this shard in this process; without shards, ``shard``."""
    if not hasattr(like, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    size = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(shard, like.device_mesh, like.placements, run_check=False, **size)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all processes; every process must call this."""
    return cast("Any", tensor.detach()).full_tensor() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """Return the shard of a full tensor that this process holds if the tensor is sharded as ``like``."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


@contextmanager
def join_process_group(device: str, grad_accum: int, parallel: str = "ddp") -> Iterator[ProcessGroup]:
    """Join the job that torchrun started; without torchrun, yield a group of one process.

    The arguments are params of the section ``train``; a UserError names a param that does not fit the job.
    Raise PeerLostError if another process has failed or cannot be reached.
    """
    rank, world_size = environment_integer("RANK", 0), environment_integer("WORLD_SIZE", 1, least=1)
    if grad_accum % world_size:
        raise UserError(
            f"train.grad_accum: {grad_accum} micro-batches cannot be shared equally by {world_size} processes; "
            f"set it to a multiple of {world_size}"
        )
    if world_size == 1:
        yield ProcessGroup(0, 1, choose_device(device))
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        advice = "start the processes with torchrun, or unset WORLD_SIZE"
        raise UserError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; {advice}")
    if ":" in device:
        raise UserError(f"train.device: {device} is a single device, but there are {world_size} processes; use cuda")
    own_device = choose_device(device, environment_integer("LOCAL_RANK", 0))
    cuda = own_device.type == "cuda"
    # Processes wait while rank 0 writes a checkpoint, so the timeout must exceed that.
    timeout = timedelta(seconds=environment_number("MINIGPT_PEER_SECONDS", 300))
    try:
        store = next(rendezvous("env://", timeout=timeout))[0]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun's agent keeps its store over restarts, and the store still has the addresses of dead processes.
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        distributed.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout,
            device_id=own_device if cuda else None,
        )  # fmt: skip
        yield ProcessGroup(rank, world_size, own_device, parallel == "fsdp")
    except RuntimeError as error:
        # NCCL and the store have error classes. Errors of gloo have none, but their text starts with a source path.
        if isinstance(error, distributed.DistError) or "gloo/" in str(error):
            raise PeerLostError(str(error).strip().splitlines()[0]) from error
        raise
    # Not after an error, because NCCL would wait for processes that no longer exist.
    distributed.destroy_process_group()
