"""TODO."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt.errors import UserError
from minigpt.runtime.cpu import processor, unbind

if TYPE_CHECKING:
    pass


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
