"""Linear maps with bfloat16 or int8 weights, drop-in replacements for those of a trained model.

Writing one character reads every weight once, so the size of the weights bounds the speed. Activations are bfloat16
then, and attention is computed as ever.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import GPT, Linear, Norm
from minigpt.runtime.device import has_bfloat16

WeightDtype = Literal["float32", "bfloat16", "int8"]
"""Formats of the weights of linear maps; float32 leaves them as they are."""


def choose_weight_dtype(name: str, device: torch.device) -> WeightDtype:
    """Return the dtype for ``sample.dtype``: ``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    return cast("WeightDtype", name)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (out, in) to integers in [-127, 127] with one scale per row.

    Returns:
        Integers, int8 (out, in), and scales, bfloat16 (out,), which are the largest magnitude of the row over 127.
    """
    scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    integers = (weight / scales.to(weight.dtype)[:, None]).round().clamp(-127, 127)
    return integers.to(torch.int8), scales


class BFloat16Linear:
    """Linear map with bfloat16 weights, for bfloat16 inputs.

    On a CPU the weight is prepacked in oneDNN's own layout: packed again in every call, a product takes twice as long.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.bfloat16()
        self.bias = None if bias is None else bias.detach().bfloat16()
        onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.prepacked = onednn and not weight.is_cuda
        if self.prepacked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        if not self.prepacked:
            return F.linear(x, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


class Int8Linear:
    """Linear map with int8 weights on a CPU, for bfloat16 inputs: the product multiplies in bfloat16.

    It takes 32 inputs at a time, so the weight is padded with zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        integers, self.scales = quantize_int8(weight)
        self.padding = -integers.size(1) % 32
        self.weight = F.pad(integers, (0, self.padding))
        self.bias = None if bias is None else bias.detach().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        rows = F.pad(x, (0, self.padding)) if self.padding else x
        y = torch._weight_int8pack_mm(rows.flatten(0, -2), self.weight, self.scales).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize(model: GPT, dtype: WeightDtype) -> GPT:
    """Return ``model`` with the weights of its linear maps in ``dtype``; all other tensors are shared.

    A GPU has no product with int8 weights in torch: there they are rounded to int8 and stored in bfloat16.
    """
    if dtype == "float32":
        return model
    quantized = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    quantized.compute_dtype = torch.bfloat16
    for module in list(quantized.modules()):
        for name, child in list(module.named_children()):
            # Plain callables, since calling a module takes some microseconds.
            if isinstance(child, Linear):
                delattr(module, name)
                setattr(module, name, _quantized_linear(child, dtype))
            elif isinstance(child, Norm) and name != "embd_norm":  # which normalizes in float32
                weight, bias = (None if p is None else p.detach().bfloat16() for p in (child.weight, child.bias))
                delattr(module, name)
                norm = partial(torch.layer_norm, normalized_shape=[child.size], weight=weight, bias=bias)
                setattr(module, name, norm)
    return quantized


def _quantized_linear(linear: Linear, dtype: WeightDtype) -> BFloat16Linear | Int8Linear:
    weight = linear.weight.detach()
    if dtype == "int8" and not weight.is_cuda:
        return Int8Linear(weight, linear.bias)
    return BFloat16Linear(round_weight(weight, dtype), linear.bias)


def round_weight(weight: Tensor, dtype: WeightDtype) -> Tensor:
    """Return the matrix rounded to ``dtype``, stored as before."""
    if dtype == "int8":
        integers, scales = quantize_int8(weight)
        return integers * scales.to(weight.dtype)[:, None]
    return weight.bfloat16().to(weight.dtype) if dtype == "bfloat16" else weight


@torch.no_grad()
def rounded_copy(model: GPT, dtype: WeightDtype) -> GPT:
    """Return a copy with rounded weights and otherwise unchanged: what :func:`quantize` computes, for full batches."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(round_weight(module.weight.detach(), dtype))  # a tied embedding stays exact
    return result


def loss_by_weights(model: GPT, loss: Callable[[GPT], float]) -> dict[str, float]:
    """Return the loss with weights of each dtype, with the activations that :func:`quantize` gives the model.

    Where the model computes the same, ``loss`` is called with the model itself, which it may recognize to save a pass.
    """
    device = model.embedding.weight.device
    losses = {}
    for dtype in get_args(WeightDtype):
        compute = torch.bfloat16 if dtype != "float32" and has_bfloat16(device) else None
        # Linear maps cast their weights to the compute dtype.
        if compute == model.compute_dtype and dtype == ("float32" if compute is None else "bfloat16"):
            losses[dtype] = loss(model)
            continue
        variant = rounded_copy(model, dtype)
        variant.compute_dtype = compute
        losses[dtype] = loss(variant)
    return losses
