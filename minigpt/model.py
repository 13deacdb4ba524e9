"""The GPT: a decoder-only transformer over characters. Its attention and causal mask are in ops.py.

Shapes in comments: B sequences, T characters, C = n_embd, H heads of S = head_size channels, V = vocab_size.

The classic architecture is GPT-2's (Radford et al. 2019): learned positions, LayerNorm before each sub-layer and at
the end. The recipe adds, each behind a switch in params.yaml: rotary positions (Su et al. 2021), LayerNorm on queries
and keys (Dehghani et al. 2023), squared ReLU (So et al. 2021), outputs that start at zero (as in Zhang et al. 2019),
and short causal convolutions over the embeddings and over the input of each feed-forward layer (compare So et al. 2021,
and layer "Canon C" of Allen-Zhu 2025).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt import ops
from minigpt.cache import ConvState, KVCache, LayerCache
from minigpt.choices import ACTIVATIONS
from minigpt.params import ModelParams

MATRIX_INIT = 0.7
"""Scale of the uniform initialization of ``init: zero``; 1 would keep the variance of the activations."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles of T positions, each (T, S/2)."""


class Linear(nn.Linear):
    """Linear map computed in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm over the last dimension, in the dtype of its input, with scale and shift only if ``affine``."""

    def __init__(self, size: int, affine: bool) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, keeping its shape."""
        if self.weight is None or self.bias is None:
            return F.layer_norm(x, (self.size,))
        return F.layer_norm(x, (self.size,), self.weight.to(x.dtype), self.bias.to(x.dtype))


class ChannelDropout(nn.Module):
    """Dropout of whole channels: one mask per sequence, shared by its positions.

    Elementwise dropout draws T times more random numbers, which costs 45 % more time on a CPU.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero channels of (B, T, C) with probability p and scale the rest by 1 / (1 - p), in training only."""
        if not self.training or not self.p:
            return x
        kept = torch.rand(x.size(0), 1, x.size(2), device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1 - self.p))


class Attention(nn.Module):
    """Causal self-attention, H * S channels wide inside."""

    def __init__(self, config: ModelParams) -> None:
        super().__init__()
        self.config = config
        width = config.n_head * config.head_size
        self.qkv = Linear(config.n_embd, 3 * width, bias=config.bias)
        self.out = Linear(width, config.n_embd, bias=config.bias)
        self.dropout = config.dropout if config.dropout_kind == "element" else 0.0

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None, cache: LayerCache | None) -> Tensor:
        """Mix each position of x, (B, T, C), with those that it attends to.

        ``mask`` says which those are (:func:`minigpt.ops.attention_mask`, or the cache's); ``rotary`` has the angles of
        the positions; ``cache`` the keys and values of the characters before x.
        """
        B, T, _ = x.shape
        H, S = self.config.n_head, self.config.head_size
        qkv = self.qkv(x).view(B, T, 3, H, S).permute(2, 0, 3, 1, 4)  # (3, B, H, T, S)
        qkv = qkv.contiguous() if cache is None else qkv.to(cache.keys.dtype)
        qk, (v,) = qkv.split((2, 1))
        if self.config.qk_norm:
            qk = F.layer_norm(qk, (S,))
        if rotary is not None:
            qk = ops.rotate(qk, *rotary)
        q, k = qk.unbind()
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = ops.causal_attention(q, k, v, mask, window=self.config.attention_window, dropout=dropout)
        else:
            y = F.scaled_dot_product_attention(q, *cache.append(k, v), mask)
        return self.out(y.transpose(1, 2).reshape(B, T, H * S).to(x.dtype))


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, applied to each position alone."""

    def __init__(self, config: ModelParams) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.activation]
        self.activate = activation.function
        hidden = hidden_size(config)
        self.up = Linear(config.n_embd, activation.maps * hidden, bias=config.bias)
        self.down = Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down(self.activate(self.up(x)))


class Block(nn.Module):
    """Transformer block: each sub-layer reads the normalized residual stream and adds its output to it."""

    def __init__(self, config: ModelParams) -> None:
        super().__init__()
        self.has_conv = config.mlp_conv > 1
        dropout = ChannelDropout if config.dropout_kind == "channel" else nn.Dropout
        self.norm1 = Norm(config.n_embd, config.norm_affine)
        self.attention = Attention(config)
        self.norm2 = Norm(config.n_embd, config.norm_affine)
        if self.has_conv:
            self.conv = nn.Parameter(torch.zeros(config.mlp_conv - 1, config.n_embd))
        self.feed_forward = FeedForward(config)
        self.dropout = dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); the other arguments are those of :meth:`Attention.forward`."""
        y = self.attention(self.norm1(x), mask, rotary, cache)
        x = x + (self.dropout(y) if self.training else y)
        y = self.norm2(x)
        if self.has_conv:
            y = convolve(y, self.conv, None if cache is None else cache.mlp_conv)
        y = self.feed_forward(y)
        return x + (self.dropout(y) if self.training else y)


class GPT(nn.Module):
    """Logits of the next character at every position of a sequence.

    Args:
        config: the architecture, the section ``model`` of params.yaml.
        vocab_size: characters V.

    Attributes:
        compute_dtype: of activations; None for the dtype of the weights.
        checkpointing: keep only the input of each block in training, and compute the rest again for the gradient
            (Chen et al. 2016): a third more work, for the activation memory of one block instead of n_layer.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelParams, vocab_size: int) -> None:
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
        if config.positions == "rotary":
            cos, sin = rotary_angles(config, T)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from torch's generator.

        ``normal``: every matrix and embedding from N(0, 0.02²), biases 0. (GPT-2 draws the maps that write to the
        residual stream from smaller values.) ``zero``: those maps and the head start at 0, so at first each block
        passes its input on and all characters are equally likely (a loss of ln V); the other matrices are uniform in
        ±0.7 sqrt(3 / fan_in); character embeddings are N(0, 1) if a norm follows them, and N(0, 0.02²) if they are the
        head too.
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

    def forward(self, ids: Tensor, cache: KVCache | None = None, num_logits: int | None = None) -> Tensor:
        """Compute the logits of the next character.

        Args:
            ids: characters, int64 (B, T). Without a cache they start a sequence, and T is at most block_size.
            cache: the characters before; these are added to it.
            num_logits: compute logits at the last positions only; None: at all.

        Returns:
            (B, num_logits or T, V), in at least float32.
        """
        T = ids.size(1)
        current = None if cache is None else cache.reserve(T)
        positions = slice(0, T) if current is None else current.positions
        x = self._embed(ids, positions, cache)
        if current is None:
            mask = ops.attention_mask(x, T, self.config.attention_window, self.config.n_head)
        else:
            mask = current.mask
        rotary = self._rotary(positions, x.dtype if cache is None else cache.dtype)
        for number, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, mask, rotary, use_reentrant=False)
            else:
                x = block(x, mask, rotary, None if cache is None else cache.layers[number])
        if cache is not None:
            cache.advance(T)
        if num_logits is not None:
            x = x[:, -num_logits:]
        logits: Tensor = self.head(self.norm(x))
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def _embed(self, ids: Tensor, positions: slice | Tensor, cache: KVCache | None) -> Tensor:
        """Return the start of the residual stream, (B, T, C): characters, the characters before them, positions."""
        config = self.config
        x = self.embedding(ids)
        if config.embd_conv > 1:
            x = convolve(x, self.conv, None if cache is None else cache.embedding_conv)
        if config.positions == "learned":
            x = x + self.position.weight[positions]
        x = self.embd_norm(x)
        return x.to(self.compute_dtype) if self.compute_dtype else x

    def _rotary(self, positions: slice | Tensor, dtype: torch.dtype) -> Rotary | None:
        if self.config.positions == "learned":
            return None
        if isinstance(positions, slice):
            self.extend_rotary(positions.stop)
        return self.cos[positions].to(dtype), self.sin[positions].to(dtype)

    def extend_rotary(self, length: int) -> bool:
        """Have rotary angles for ``length`` positions, which may exceed the context; return whether any were added."""
        if self.config.positions == "learned" or length <= len(self.cos):
            return False
        self.cos, self.sin = (t.to(self.cos) for t in rotary_angles(self.config, 2 * length))
        return True

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of keys and values: at least float32 on a CPU, where torch takes 3 to 7 times as long for bfloat16."""
        weight = self.embedding.weight
        dtype = self.compute_dtype or weight.dtype
        return dtype if weight.is_cuda else torch.promote_types(dtype, torch.float32)

    def make_cache(self, batch_size: int, slots: int | None = None) -> KVCache:
        """Return an empty cache for ``batch_size`` sequences with room for ``slots`` characters, or a context."""
        slots = slots or self.config.block_size
        return KVCache(self.config, batch_size, slots, self.cache_dtype, self.embedding.weight.device)

    def matrices(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the weight matrices of the blocks, each with the number of equal maps stacked in its rows.

        Those are q, k and v, and the two halves of a gated activation.
        """
        for block in self.blocks:
            yield block.attention.qkv.weight, 3
            yield block.attention.out.weight, 1
            up, down = block.feed_forward.up, block.feed_forward.down
            yield up.weight, up.out_features // down.in_features
            yield down.weight, 1

    def flops_per_character(self) -> int:
        """Return the floating-point operations of training on one character (Chowdhery et al. 2022, appendix B).

        6 for each weight of a linear map, and 12 for each layer, channel of attention, and character attended to.
        """
        config = self.config
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * weights + 12 * config.n_layer * config.n_head * config.head_size * config.window

    def num_parameters(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.parameters())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off in the block, and then as they were."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def convolve(x: Tensor, weights: Tensor, recent: ConvState | None) -> Tensor:
    """Add to each position of x, (B, T, C), its weighted predecessors, which may be in a cache: ``recent``."""
    if recent is None:
        return ops.causal_convolution(x, weights)
    return ops.causal_convolution(recent.join(x), weights)[:, -x.size(1) :]


def weight_shapes(config: ModelParams, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name in the state dict, without building the model, which may be huge.

    A tied head has no entry of its own.
    """
    C, width = config.n_embd, config.n_head * config.head_size
    hidden = hidden_size(config)

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if config.bias else {})

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (C,) for part in ("weight", "bias") if config.norm_affine}

    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab_size, C)}
    if config.positions == "learned":
        shapes["position.weight"] = (config.block_size, C)
    if config.embd_conv > 1:
        shapes["conv"] = (config.embd_conv - 1, C)
    for block in (f"blocks.{number}" for number in range(config.n_layer)):
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        shapes |= linear(f"{block}.attention.qkv", 3 * width, C) | linear(f"{block}.attention.out", C, width)
        if config.mlp_conv > 1:
            shapes[f"{block}.conv"] = (config.mlp_conv - 1, C)
        shapes |= linear(f"{block}.feed_forward.up", ACTIVATIONS[config.activation].maps * hidden, C)
        shapes |= linear(f"{block}.feed_forward.down", C, hidden)
    shapes |= norm("norm") | linear("head", vocab_size, C)
    if config.tied_head:
        del shapes["head.weight"]
    return shapes


def hidden_size(config: ModelParams) -> int:
    """Return the width of the hidden layer of a feed-forward layer."""
    return max(1, round(config.mlp_ratio * config.n_embd))


def rotary_angles(config: ModelParams, length: int) -> Rotary:
    """Return cosines and sines of the rotary angles of the first ``length`` positions, float32 (length, S/2).

    Channel pair i of S/2 turns by rotary_base ** -(2 i / S) radians from one position to the next (Su et al. 2021).
    """
    half = config.head_size // 2
    speed = config.rotary_base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
    return angle.cos().float(), angle.sin().float()
