"""TODO."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class SquaredReLU(torch.autograd.Function):
    """relu(x)², keeping one tensor for the gradient where the composed form passes over two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape."""
        rectified = x.clamp_min(0)
        ctx.save_for_backward(rectified)
        return rectified * rectified

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """2 relu(x) times the gradient."""
        (rectified,) = ctx.saved_tensors
        return (grad * rectified).mul_(2)


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of the feed-forward layer, elementwise; ``swiglu`` halves the last dimension.

    SwiGLU (Shazeer 2020) multiplies the second half of the channels by silu(z) = z sigmoid(z) of the first.
    """
    if name == "swiglu":
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value
    if name == "relu2":
        if x.requires_grad:
            return cast("Tensor", SquaredReLU.apply(x))  # type: ignore[no-untyped-call]
        rectified = F.relu(x)
        return rectified * rectified
    return F.relu(x) if name == "relu" else F.gelu(x)


class Rotation(torch.autograd.Function):
    """Turn each pair (i, i + S/2) of channels by its position's angle; the gradient is turned back.

    In place of six elementwise passes and two for the gradient of each, four and four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Channels (..., T, S), angles' cosines and sines (T, S/2)."""
        ctx.save_for_backward(cos, sin)
        return Rotation.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The inverse rotation of the gradient."""
        cos, sin = ctx.saved_tensors
        return Rotation.turn(grad, cos, -sin), None, None

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(left cos - right sin, right cos + left sin)."""
        left, right = x.chunk(2, -1)
        if torch.compiler.is_compiling():
            return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
        turned = torch.empty_like(x)
        new_left, new_right = turned.chunk(2, -1)
        torch.mul(left, cos, out=new_left)
        new_left.addcmul_(right, sin, value=-1)
        torch.mul(right, cos, out=new_right)
        new_right.addcmul_(left, sin)
        return turned


def causal_mask(length: int, window: int = 0) -> Tensor:
    """0 where a position may look, at itself and what is before (the last ``window``; 0: all), else -inf; (T, T)."""
    visible = torch.ones(length, length).tril()
    if window:
        visible = visible.triu(1 - window)
    return torch.zeros(length, length).masked_fill_(visible == 0, -math.inf)


def local_mask(window: int, length: int, sequences: int, like: Tensor) -> Tensor:
    """For each chunk of ``window`` queries, which of its own and the previous chunk's keys each may look at.

    Returns:
        0 and -inf, (sequences * chunks, W, 2 W), of dtype and device of ``like``.
    """
    query = torch.arange(window, 2 * window, device=like.device)[:, None]
    key = torch.arange(2 * window, device=like.device)
    hidden = (key > query) | (key <= query - window)
    first = hidden | (key < window)  # before the first chunk there is nothing
    chunks = torch.stack([first] + [hidden] * (-(-length // window) - 1))
    return torch.zeros_like(chunks, dtype=like.dtype).masked_fill_(chunks, -math.inf).repeat(sequences, 1, 1)
