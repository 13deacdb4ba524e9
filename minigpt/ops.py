"""Faster equivalents of plain formulas, each below the formula that it equals.

A test compares each pair: ``model.py`` would compute the same with the plain formulas. The fast ones matter on a CPU,
where a training step is bound by the number of passes over memory.

Shapes in comments: B sequences, T characters, H heads of S = head_size channels.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_BY_PRODUCTS = 512
"""Up to this many characters, attention by explicit products is faster on a CPU than the fused kernel, whose backward
pass takes 3 times as long at 256."""


def plain_squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)² (So et al. 2021)."""
    return F.relu(x) ** 2


class _SquaredReLU(torch.autograd.Function):
    """relu(x)² that saves one tensor for the gradient. Autograd saves two and passes over both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rectified = x.clamp_min(0)
        ctx.save_for_backward(rectified)
        return rectified.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rectified,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, rectified, value=2)  # 2 * grad * rectified in one pass


def squared_relu(x: Tensor) -> Tensor:
    """Return the same as :func:`plain_squared_relu`."""
    if x.requires_grad:
        return cast("Tensor", _SquaredReLU.apply(x))  # type: ignore[no-untyped-call]
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """Return silu(a) * b for the halves a and b of the last dimension (Shazeer 2020), silu(z) = z sigmoid(z)."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + S/2) of channels by the angle of its position (Su et al. 2021).

    ``x`` is (..., T, S); cosines and sines of the angles are (T, S/2).
    """
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class _Rotation(torch.autograd.Function):
    """Rotation with four elementwise passes forward and four backward, where autograd needs six and twelve."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_into_halves(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_into_halves(grad, cos, -sin), None, None


def _rotate_into_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return plain_rotate(x, cos, sin)
    left, right = x.chunk(2, -1)
    rotated = torch.empty_like(x)
    new_left, new_right = rotated.chunk(2, -1)
    torch.mul(left, cos, out=new_left)
    new_left.addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=new_right)
    new_right.addcmul_(left, sin)
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same as :func:`plain_rotate`."""
    if not x.requires_grad:
        return _rotate_into_halves(x, cos, sin)
    return cast("Tensor", _Rotation.apply(x, cos, sin))  # type: ignore[no-untyped-call]


def plain_causal_convolution(x: Tensor, weights: Tensor) -> Tensor:
    """Add to each position t of x, (B, T, C), the sum over k of weights[k - 1] * x[t - k], for weights (taps - 1, C).

    Each channel has weights of its own, and there is nothing before the first position (compare So et al. 2021).
    """
    return x + sum(weight * F.pad(x, (0, 0, back, 0))[:, : x.size(1)] for back, weight in enumerate(weights, 1))


class _CausalConvolution(torch.autograd.Function):
    """Convolution with one pass over memory for each tap, forward and backward, where autograd needs three and four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return _add_earlier(x, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        # The gradient comes from later positions, so the same sum runs backwards.
        before = grad.clone()
        rows = []
        for back, weight in enumerate(weights.to(x.dtype), 1):
            before[:, :-back].addcmul_(grad[:, back:], weight)
            rows.append((grad[:, back:] * x[:, :-back]).sum((0, 1)))
        return before, torch.stack(rows).to(weights.dtype)


def _add_earlier(x: Tensor, weights: Tensor) -> Tensor:
    y = x.clone()
    for back, weight in enumerate(weights.to(x.dtype), 1):
        y[:, back:].addcmul_(x[:, :-back], weight)
    return y


def causal_convolution(x: Tensor, weights: Tensor) -> Tensor:
    """Return the same as :func:`plain_causal_convolution`, in the dtype of x."""
    if not x.requires_grad and not weights.requires_grad:
        return _add_earlier(x, weights)
    return cast("Tensor", _CausalConvolution.apply(x, weights))  # type: ignore[no-untyped-call]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Return softmax(q kᵀ / sqrt(S)) v over the visible positions (Vaswani et al. 2017).

    The product of two random vectors of S channels has a standard deviation of sqrt(S). Without the division, softmax
    would put nearly all its weight on one position, and its gradient would vanish.

    Queries, keys, values and the result are (B, H, T, S). Each position attends to the last ``window`` positions,
    itself included; 0: to itself and all before it.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return (scores + causal_mask(q.size(-2), window).to(q)).softmax(-1) @ v


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, window: int = 0, dropout: float = 0.0
) -> Tensor:
    """Return the same as :func:`plain_attention`, with dropout on the weights and a mask of :func:`attention_mask`."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
    if mask.ndim == 3:
        return _local_attention(q, k, v, mask, window=window, dropout=dropout)
    B, H, T, S = q.shape
    q, k, v = (t.reshape(B * H, T, S) for t in (q, k, v))
    return _attention_by_products(q, k, v, mask, dropout).view(B, H, T, S)


def attention_mask(like: Tensor, length: int, window: int, n_head: int) -> Tensor | None:
    """Return the mask of :func:`causal_attention` for T = ``length`` characters, which all layers share.

    It has the dtype and device of ``like``, a tensor of B sequences.

    Returns:
        0 where a position may attend and -inf elsewhere, (T, T); None where the fused kernel masks by itself; with a
        window below T, the mask of ``_local_attention``.
    """
    if 0 < window < length:
        copies = 1 if like.is_cuda else like.size(0) * n_head  # baddbmm has heads and chunks in one dimension
        return _local_mask(window, length, like).repeat(copies, 1, 1)
    if like.is_cuda or length > LONGEST_BY_PRODUCTS:
        return None
    return causal_mask(length).to(like)


def causal_mask(length: int, window: int = 0, rows: int = 0) -> Tensor:
    """Return 0 where a position may attend (itself and before, the last ``window``; 0: all), else -inf, (T, T).

    ``rows`` limits the mask to the last rows, (rows, T); 0: all.
    """
    query, key = torch.arange(length - (rows or length), length)[:, None], torch.arange(length)
    hidden = is_hidden(query, key, window or length)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def is_hidden(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return whether a query may not attend to a key, given their positions: it is later, or too early."""
    return (key > query) | (key <= query - window)


def _local_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, window: int, dropout: float) -> Tensor:
    """Attend within a window W, in chunks of W queries that see their own chunk and the one before.

    All of (B, H, T, S), T above W. The cost grows with T W instead of T².
    """
    B, H, T, S = q.shape
    W = window
    chunks = -(-T // W)
    if missing := chunks * W - T:
        q, k, v = (F.pad(t, (0, 0, 0, missing)) for t in (q, k, v))
    q, k, v = (t.reshape(B * H, chunks, W, S) for t in (q, k, v))
    k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t), 2) for t in (k, v))  # (B H, chunks, 2 W, S)
    if mask.size(0) == chunks:  # the same for all heads
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    else:
        y = _attention_by_products(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, dropout)
    return y.view(B, H, chunks * W, S)[:, :, :T]


def _local_mask(window: int, length: int, like: Tensor) -> Tensor:
    """Return 0 for the keys, of its own and the previous chunk, that a query may attend to, (chunks, W, 2 W)."""
    query = torch.arange(window, 2 * window, device=like.device)[:, None]
    key = torch.arange(2 * window, device=like.device)
    hidden = is_hidden(query, key, window)
    first = hidden | (key < window)  # nothing precedes the first chunk
    chunks = torch.stack([first] + [hidden] * (-(-length // window) - 1))
    return torch.zeros_like(chunks, dtype=like.dtype).masked_fill_(chunks, -math.inf)


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attend from (N, T, S) to (N, U, S), under a mask that broadcasts to (N, T, U)."""
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5).softmax(-1)
    return torch.bmm(F.dropout(weights, dropout) if dropout else weights, v)
