"""Check that a training fits into the memory of its device, before anything is allocated."""

import math

import psutil
import torch

from minigpt.errors import UserError
from minigpt.model import hidden_size, weight_shapes
from minigpt.params import Params
from minigpt.runtime.device import compute_dtype

BYTES_PER_WEIGHT = 16
"""Weight, gradient, a moment of the optimizer, and the best weights so far, in float32."""


def lower_bounds(params: Params, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Return bytes that a training needs at least: for weights, and for the activations of one micro-batch."""
    model, train = params.model, params.train
    weights = sum(map(math.prod, weight_shapes(model, vocab_size).values()))
    characters = train.batch_size // train.grad_accum * model.block_size
    # The input of each block and, unless they are computed again, queries, keys, values, the result of attention, and
    # the hidden layer. In float32: the log-probabilities and the gradient of the logits.
    size = (compute_dtype(train.dtype, device) or torch.float32).itemsize
    per_block = model.n_embd
    if not train.activation_checkpointing:
        per_block += 4 * model.n_head * model.head_size + hidden_size(model)
    return BYTES_PER_WEIGHT * weights, characters * (size * model.n_layer * per_block + 8 * vocab_size)


def check_memory(params: Params, vocab_size: int, device: torch.device, world_size: int = 1) -> None:
    """Raise a UserError if the training certainly needs more memory than ``device`` has."""
    on_gpu = device.type == "cuda"
    available = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    weights, activations = lower_bounds(params, vocab_size, device)
    if params.train.parallel == "fsdp":
        weights //= world_size
    model, train = params.model, params.train
    if weights > available:
        what, needed = "weights and their optimizer state", weights
        advice = f"model.n_layer ({model.n_layer:,}), n_embd ({model.n_embd:,}) or mlp_ratio ({model.mlp_ratio:g})"
    elif activations > available:
        what, needed = "activations of a micro-batch", activations
        advice = f"train.batch_size ({train.batch_size:,}) or model.block_size ({model.block_size:,})"
    else:
        return
    raise UserError(
        f"params.yaml: the {what} need at least {needed / 1e9:,.0f} GB, but the "
        f"{'GPU' if on_gpu else 'machine'} has {available / 1e9:,.0f} GB; reduce {advice}"
    )
