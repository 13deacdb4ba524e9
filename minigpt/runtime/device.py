"""Compute device of a process, and the number format that is fastest on it."""

import re

import torch

from minigpt.errors import UserError
from minigpt.runtime.cpu import cpu_info, hold_locks, unbind_threads

PEAK_FLOPS = {
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bfloat16 FLOP/s of GPUs by a word of their names (NVIDIA's data sheets; of several versions, SXM)."""


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device for ``train.device``; ``auto`` is a CUDA device, else the CPU.

    Each rank of a job takes the CUDA device with its ``local_rank``. A single process takes the first one that no other
    process of this project uses, so that queued experiments use different devices. Raise UserError if there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = name.partition(":")[2] or local_rank
    index = free_device(count) if number is None else int(number)
    if index >= count:
        raise UserError(f"train.device: {name} is not available (CUDA devices found: {count}); set it to auto")
    torch.cuda.set_device(index)
    unbind_threads()
    return torch.device("cuda", index)


def free_device(count: int) -> int:
    """Reserve the first free CUDA device and return its index; return 0 if none is free or ``count`` is at most 1."""
    for index in range(count if count > 1 else 0):
        if hold_locks([str(torch.cuda.get_device_properties(index).uuid)]):
            return index
    return 0


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of the GPU called ``name``, or None if they are not known."""
    return next((flops for word, flops in PEAK_FLOPS.items() if re.search(rf"\b{word}\b", name)), None)


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of activations for ``train.dtype``; None means that of the weights, float32.

    ``auto`` is bfloat16 on NVIDIA GPUs that support it and on CPUs that multiply it faster than float32.
    """
    if name == "auto":
        slow = device.type == "cpu" and bfloat16_at_half_rate() and not torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bfloat16(device) and not slow else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 numbers, at any rate."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bfloat16_at_half_rate() -> bool:
    """Return whether the CPU's instructions for pairs of bfloat16 numbers run at half the rate of float32.

    Intel's take as long as four instructions in float32, which each do half as much. AMD's run at double the rate.
    """
    return "GenuineIntel" in cpu_info("vendor_id") and "avx512_bf16" in cpu_info("flags").split()
