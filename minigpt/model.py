"""The GPT: a decoder-only transformer over characters, in one file that reads top to bottom.

Shapes in comments: B sequences, T characters, C = n_embd, H heads of S = head_size channels, V = vocab_size.

The classic architecture is GPT-2's (Radford et al. 2019): learned positions, LayerNorm before each sub-layer and
at the end. The switches of the recipe: rotary positions (Su et al. 2021), LayerNorm on queries and keys (Henry et
al. 2020), squared ReLU (So et al. 2021), zero-initialised outputs (as in Zhang et al. 2019), and a short causal
convolution over the embeddings (compare So et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.ops import Rotation, activate, causal_mask, local_mask
from minigpt.params import ModelParams as Config

MATRIX_INIT = 0.7
"""Scale of the uniform initialisation of ``init: zero``, in units of that which keeps the variance."""


class Linear(nn.Linear):
    """A linear map computed in the dtype of its input, whatever dtype its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm over the last dimension, in the dtype of its input; scale and shift only where ``affine``."""

    def __init__(self, size: int, affine: bool) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; its shape stays."""
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, (self.size,))
        return F.layer_norm(x, (self.size,), self.weight.to(x.dtype), self.bias.to(x.dtype))


class ChannelDropout(nn.Module):
    """Dropout of whole channels: one mask per sequence, shared by its positions. Input (B, T, C)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero channels with probability p and scale the rest by 1 / (1 - p), in training only."""
        if not self.training or not self.p:
            return x
        kept = torch.rand(x.size(0), 1, x.size(2), device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))


class Attention(nn.Module):
    """Causal self-attention, n_head * head_size wide inside, scaled by 1 / sqrt(head_size)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.n_head * config.head_size
        self.qkv = Linear(config.n_embd, 3 * width, bias=config.bias)
        self.out = Linear(width, config.n_embd, bias=config.bias)
        self.dropout = config.dropout if config.dropout_kind == "element" else 0.0

    def forward(self, x: Tensor, mask: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend.

        Args:
            x: (B, T, C).
            mask: 0 where a position may look and -inf elsewhere, (T, T); or :func:`local_mask`.
            cos_sin: of the rotary angles, each (T, S/2).

        Returns:
            (B, T, C).
        """
        B, T, _ = x.shape
        H, S = self.config.n_head, self.config.head_size
        qkv = self.qkv(x).view(B, T, 3, H, S).permute(2, 0, 3, 1, 4).contiguous()  # (3, B, H, T, S)
        qk, (v,) = qkv.split((2, 1))
        if self.config.qk_norm:
            qk = F.layer_norm(qk, (S,))
        if cos_sin:
            qk = cast("Tensor", Rotation.apply(qk, *cos_sin))  # type: ignore[no-untyped-call]
        q, k = qk.unbind()
        y = self._attend_locally(q, k, v, mask) if mask.ndim == 3 else self._attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, H * S))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention to all earlier positions: (B, H, T, S) -> (B, H, T, S)."""
        B, H, T, S = q.shape
        if q.is_cuda or T > 512:
            return F.scaled_dot_product_attention(q, k, v, None, self.dropout if self.training else 0.0, is_causal=True)
        # On a CPU and short contexts, the fused kernel's backward pass is slower than these products: 3 times at 256.
        q, k, v = (t.reshape(B * H, T, S) for t in (q, k, v))
        return self._by_products(q, k, v, mask).view(B, H, T, S)

    def _attend_locally(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The same within a window W, in chunks of W queries that look at their own chunk and the one before.

        All of (B, H, T, S), and T above W; the cost grows with T W in place of T².
        """
        B, H, T, S = q.shape
        W = self.config.attention_window
        chunks = -(-T // W)
        if missing := chunks * W - T:
            q, k, v = (F.pad(t, (0, 0, 0, missing)) for t in (q, k, v))
        q, k, v = (t.reshape(B * H, chunks, W, S) for t in (q, k, v))
        k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t), 2) for t in (k, v))  # (B H, chunks, 2 W, S)
        if mask.size(0) == chunks:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        else:
            y = self._by_products(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
        return y.view(B, H, chunks * W, S)[:, :, :T]

    def _by_products(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention of (N, T, S) on (N, U, S), under a mask that broadcasts to (N, T, U)."""
        weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5).softmax(-1)
        return torch.bmm(F.dropout(weights, self.dropout, self.training) if self.dropout else weights, v)


def rotary_angles(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which rotary positions turn each pair of channels, float32 (length, S/2).

    Pair i of S/2 turns by rotary_base ** -(2 i / S) radians from one position to the next (Su et al. 2021).
    """
    half = config.head_size // 2
    speed = config.rotary_base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
    return angle.cos().float(), angle.sin().float()


class FeedForward(nn.Module):
    """The position-wise layer: up, activation, down."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation = config.activation
        hidden = max(1, round(config.mlp_ratio * config.n_embd))
        maps = 2 if config.activation == "swiglu" else 1
        self.up = Linear(config.n_embd, maps * hidden, bias=config.bias)
        self.down = Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(activate(self.up(x), self.activation))


class Block(nn.Module):
    """One transformer block: each sub-layer reads a normalised residual stream and adds to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dropout = ChannelDropout if config.dropout_kind == "channel" else nn.Dropout
        self.norm1 = Norm(config.n_embd, config.norm_affine)
        self.attention = Attention(config)
        self.norm2 = Norm(config.n_embd, config.norm_affine)
        self.feed_forward = FeedForward(config)
        self.dropout = dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, C) -> (B, T, C); the other arguments are :meth:`Attention.forward`'s."""
        x = x + self.dropout(self.attention(self.norm1(x), mask, cos_sin))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Logits of the next character, for every position of a sequence.

    Args:
        config: the architecture, the section ``model`` of the params.
        vocab_size: characters V.

    Attributes:
        compute_dtype: what activations are computed in; None for the dtype of the weights.
        checkpointing: in training, keep only each block's input and compute the rest anew for the gradient (Chen et
            al. 2016): a third more work, and of the activations' memory what one block takes.
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.compute_dtype: torch.dtype | None = None
        self.checkpointing = False
        C, T = config.n_embd, config.block_size
        self.embedding = nn.Embedding(vocab_size, C)
        if config.positions == "learned":
            self.position = nn.Embedding(T, C)
        if config.embd_conv > 1:
            self.conv = nn.Parameter(torch.zeros(config.embd_conv - 1, C))
        self.embd_norm = Norm(C, False) if config.embd_norm else nn.Identity()
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(config) for _ in range(config.n_layer)))
        self.norm = Norm(C, config.norm_affine)
        self.head = Linear(C, vocab_size, bias=config.bias)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self.register_buffer("mask", causal_mask(T), persistent=False)
        if config.positions == "rotary":
            cos, sin = rotary_angles(config, T)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from torch's generator.

        ``normal``: every matrix and embedding N(0, 0.02²), biases 0, as in GPT-2. ``zero``: what writes to the
        residual stream and the head start at 0, so that at first every block passes its input on and all characters
        are equally likely (a loss of ln V); the other matrices are uniform within ±0.7 sqrt(3 / fan_in); character
        embeddings are N(0, 1) where a norm follows them.
        """
        config = self.config
        zero = config.init == "zero"
        for module in self.modules():
            if isinstance(module, Linear):
                if zero:
                    bound = MATRIX_INIT * math.sqrt(3 / module.in_features)
                    module.weight.uniform_(-bound, bound)
                else:
                    module.weight.normal_(std=0.02)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02)
        if zero:
            for block in self.blocks:
                block.attention.out.weight.zero_()
                block.feed_forward.down.weight.zero_()
            if config.tied_head:
                self.embedding.weight.normal_(std=0.02)
            else:
                self.embedding.weight.normal_(std=1.0 if config.embd_norm else 0.02)
                self.head.weight.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits in at least float32.

        Args:
            ids: characters, int64 (B, T), T at most block_size.

        Returns:
            (B, T, V): at each position, the logits of the character that comes next.
        """
        T = ids.size(1)
        x = self._embed(ids)
        if 0 < self.config.attention_window < T:
            sequences = 1 if x.is_cuda else ids.size(0) * self.config.n_head  # the products do not broadcast
            mask = local_mask(self.config.attention_window, T, sequences, x)
        else:
            mask = self.mask[:T, :T].to(x.dtype)
        cos_sin = None
        if self.config.positions == "rotary":
            cos_sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, mask, cos_sin, use_reentrant=False)
            else:
                x = block(x, mask, cos_sin)
        logits: Tensor = self.head(self.norm(x))
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def _embed(self, ids: Tensor) -> Tensor:
        """The residual stream's start, (B, T, C): characters, their neighbours, positions."""
        config = self.config
        x = self.embedding(ids)
        if config.embd_conv > 1:
            mixed = x
            for back, weight in enumerate(self.conv[: x.size(1) - 1], 1):
                mixed = mixed + weight * F.pad(x, (0, 0, back, -back))
            x = mixed
        if config.positions == "learned":
            x = x + self.position.weight[: ids.size(1)]
        x = self.embd_norm(x)
        return x.to(self.compute_dtype) if self.compute_dtype else x

    def matrices(self) -> Iterator[tuple[Tensor, int]]:
        """The blocks' weight matrices, each with the number of equal maps stacked in its rows.

        Those are q, k and v, and the two halves of SwiGLU.
        """
        for block in self.blocks:
            yield block.attention.qkv.weight, 3
            yield block.attention.out.weight, 1
            up, down = block.feed_forward.up, block.feed_forward.down
            yield up.weight, up.out_features // down.in_features
            yield down.weight, 1

    def flops_per_character(self) -> int:
        """Floating-point operations of training on a character (Chowdhery et al. 2022, appendix B).

        6 for each weight of a linear map, and 12 for each layer, channel of attention, and character attended to.
        """
        config = self.config
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        span = min(config.block_size, config.attention_window or config.block_size)
        return 6 * weights + 12 * config.n_layer * config.n_head * config.head_size * span

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())
