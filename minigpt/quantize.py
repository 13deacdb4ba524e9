"""TODO."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model import GPT, Linear, Norm
from minigpt.runtime.device import has_bfloat16

Weights = Literal["float32", "bfloat16", "int8"]
"""What the weights of linear maps are rounded to; float32 stands for the dtype that they have."""


def choose_weight_dtype(name: str, device: torch.device) -> Weights:
    """The weights for ``sample.dtype``: ``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    return cast("Weights", name)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (out, in) to integers in [-127, 127], each row in a unit of its own.

    Returns:
        the integers, int8 (out, in), and the units (out,), bfloat16: a 127th of the row's largest magnitude.
    """
    units = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    integers = (weight / units.to(weight.dtype)[:, None]).round().clamp(-127, 127)
    return integers.to(torch.int8), units


@torch.no_grad()
def rounded(model: GPT, weights: Weights) -> GPT:
    """A copy of ``model`` with the weights that a :class:`Decoder` reads it with: what tells their cost in loss."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, Linear) and weights == "int8":
            integers, units = quantize_int8(module.weight)
            module.weight.copy_(integers * units.to(module.weight.dtype)[:, None])
        elif isinstance(module, Linear) and weights == "bfloat16":
            module.weight.copy_(module.weight.bfloat16())
    return result


def loss_by_weights(model: GPT, loss: Callable[[GPT], float]) -> dict[str, float]:
    """The loss with each of :data:`Weights`, activations as a :class:`Decoder` has them.

    Args:
        model: what is measured; with bfloat16 weights it is given to ``loss`` itself where it computes in that anyway.
        loss: of a model.
    """
    device = model.embedding.weight.device
    losses = {}
    for weights in get_args(Weights):
        variant = rounded(model, weights)
        variant.compute_dtype = torch.bfloat16 if weights != "float32" and has_bfloat16(device) else None
        same = weights == "bfloat16" and variant.compute_dtype == model.compute_dtype == torch.bfloat16
        losses[weights] = loss(model if same else variant)
    return losses


Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def packed(linear: Linear, weights: Weights) -> Function:
    """The linear map as a function of few rows, (N, in) -> (N, out).

    bfloat16 on a CPU is oneDNN's product with a weight in oneDNN's own layout; laid out anew in every call, it takes
    twice as long. int8 on a CPU is a product that reads integers and multiplies in bfloat16; on a GPU, for which torch
    has none, the rounded weights are kept in bfloat16.
    """
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if weights == "float32":
        return lambda x: F.linear(x, weight, bias)
    bias = None if bias is None else bias.bfloat16()
    if weights == "int8":
        integers, units = quantize_int8(weight)
        if not weight.is_cuda:
            return by_integers(integers, units, bias)
        weight = integers * units[:, None]
    weight = weight.bfloat16()
    if weight.is_cuda or not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return lambda x: F.linear(x, weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


def by_integers(integers: Tensor, units: Tensor, bias: Tensor | None) -> Function:
    """The linear map with weights integers * units; the product takes 32 inputs at a time, so zeros fill the last."""
    missing = -integers.size(1) % 32
    integers = F.pad(integers, (0, missing))

    def apply(x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(F.pad(x, (0, missing)) if missing else x, integers, units)
        return y if bias is None else y + bias

    return apply


def normalised(norm: Norm, dtype: torch.dtype) -> Function:
    """The LayerNorm as a function, its scale and shift in ``dtype``."""
    shape = (norm.size,)
    if norm.weight is None or norm.bias is None:
        return lambda x: F.layer_norm(x, shape)
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return lambda x: F.layer_norm(x, shape, weight, bias)
