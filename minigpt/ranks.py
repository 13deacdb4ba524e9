"""The processes of one job: their places, their devices, what each holds of the model, and sums over all of them.

torchrun starts them, or :mod:`minigpt.launcher` with torchrun's own agent; both say who is who in the environment.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minigpt.errors import PeerLost, UserError
from minigpt.process import processor, unbind

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
class Ranks:
    """This process among those of its job.

    Attributes:
        rank: this process, in [0, world).
        world: how many processes there are.
        device: where this process computes.
        sharded: each holds a part of every weight (FSDP2), not all of them (DDP).
    """

    rank: int
    world: int
    device: torch.device
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files, tracks and talks."""
        return self.rank == 0

    def micro_batches(self, grad_accum: int) -> range:
        """The micro-batches of a step that are this process's, of ``grad_accum`` over all processes."""
        return range(self.rank, grad_accum, self.world)

    def wrap(self, model: GPT) -> nn.Module:
        """``model`` on the device, and, with several processes, so that gradients are averaged over them.

        A sharded model keeps its class, and is sharded in place, block by block: only one block at a time is whole.
        """
        if self.world == 1:
            return model.to(self.device)
        if not self.sharded:
            with warnings.catch_warnings():  # older torch does not know the argument's new name
                warnings.simplefilter("ignore", FutureWarning)
                return nn.parallel.DistributedDataParallel(model.to(self.device), broadcast_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy()
        if model.compute_dtype and not model.config.norm_affine:
            # A block's maps compute in this dtype anyhow; put together in it, they are half the traffic.
            policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        return model

    def unsynced(self, parallel: nn.Module, unsynced: bool) -> AbstractContextManager[None]:
        """Leave gradients to themselves inside, where ``unsynced``: a later micro-batch will average their sum."""
        if self.world == 1:
            return nullcontext()
        if self.sharded:
            parallel.set_requires_gradient_sync(not unsynced)  # type: ignore[operator]
            return nullcontext()
        return parallel.no_sync() if unsynced else nullcontext()  # type: ignore[operator]

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

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which each process of a sharded model gives its parts."""
        norm = torch.nn.utils.get_total_norm(gradients)
        return self.sum(norm * norm).sqrt() if self.sharded else norm

    def share(self, value: T) -> T:
        """The first process's ``value``, in all."""
        if self.world == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return cast("T", values[0])

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with the first process's, in all."""
        for tensor in tensors if self.world > 1 else ():
            here = tensor.to(self.device)
            distributed.broadcast(here, src=0)
            tensor.copy_(here)

    def lockstep(self, items: Iterable[T]) -> Iterator[T | None]:
        """The items; of a sharded model's process, as many in each: None stands for what it has less than another.

        Every process must compute as often as the others: each time, they put the weights together.
        """
        if not self.sharded:
            yield from items
            return
        own = iter(items)
        while True:
            item = next(own, None)
            if not self.any(item is not None):
                return
            yield item


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A job of one process, where no device matters."""


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of its part if it is sharded, else all of it."""
    return cast("DTensor", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, sharded as ``like`` is, of which ``part`` is here; of a tensor that is not sharded, ``part``."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    mesh, shards = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return DTensor.from_local(part, mesh, shards, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, put together from its parts; every process must ask for it."""
    return cast("DTensor", tensor.detach()).full_tensor() if hasattr(tensor, "to_local") else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this process would hold if it were sharded as ``like`` is."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, shards = cast("DTensor", like).device_mesh, cast("DTensor", like).placements
    return distribute_tensor(tensor, mesh, shards, src_data_rank=None).to_local()


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device for ``train.device``: ``auto`` is a CUDA device when there is one, else the CPU.

    Of several CUDA devices, each process of a job takes the one of its ``local_rank``; a process alone takes the
    first that no other process of this project uses, so that queued experiments do not meet on one.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if named := name.partition(":")[2]:
            index = int(named)
        else:
            index = local_rank if local_rank is not None else free_device(count)
        if index >= count:
            raise UserError(f"train.device: {name} is asked for, but {count} CUDA devices are here; set it to auto")
        torch.cuda.set_device(index)
        unbind()
        return torch.device("cuda", index)
    return torch.device("cpu")


_held: list[int] = []


def free_device(count: int) -> int:
    """The first CUDA device that no process of this user has taken here, from now on taken; 0 if all are."""
    for index in range(count if count > 1 else 0):
        name = f"minigpt-{torch.cuda.get_device_properties(index).uuid}-{os.getuid()}.lock"
        lock = os.open(Path(tempfile.gettempdir()) / name, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _held.append(lock)
        return index
    return 0


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of activations for ``train.dtype``; None for that of the weights, float32.

    ``auto`` is bfloat16 on a GPU that has it, and on processors that multiply it faster than float32.
    """
    if name == "auto":
        slow = device.type == "cpu" and halves_bfloat16() and not torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bfloat16(device) and not slow else None
    return torch.bfloat16 if name == "bfloat16" else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 numbers, at whatever rate."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def halves_bfloat16() -> bool:
    """Whether the processor multiplies pairs of bfloat16 numbers, but at half the rate of float32.

    So do Intel's: one such instruction takes as long as four in float32 that do half as much each. AMD's double it.
    """
    return "GenuineIntel" in processor("vendor_id") and "avx512_bf16" in processor("flags").split()


@contextmanager
def join(device: str, grad_accum: int, parallel: str = "ddp") -> Iterator[Ranks]:
    """Take this process's place in the job that torchrun started, or be a job of one.

    Args:
        device: ``train.device``.
        grad_accum: micro-batches of a step, which the processes share equally.
        parallel: ``train.parallel``: ddp or fsdp.

    Raises:
        UserError: the processes cannot share the micro-batches, or the device is absent.
        PeerLost: another process has failed, or can no longer be reached.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if grad_accum % world:
        raise UserError(
            f"train.grad_accum: {grad_accum} micro-batches cannot be shared equally by {world} processes; "
            f"set it to a multiple of {world}"
        )
    if world == 1:
        yield Ranks(0, 1, choose_device(device))
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
        yield Ranks(rank, world, here, parallel == "fsdp")
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or GLOO in str(error):
            raise PeerLost(str(error).strip().splitlines()[0]) from error
        raise
    # Not after an error: with NCCL it would wait for those that are gone.
    distributed.destroy_process_group()
