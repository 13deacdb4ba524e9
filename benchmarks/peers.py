"""Peers that the project is measured against, written from published descriptions or taken from the package index."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Peer(nn.Module):
    """A model that can be scored and can write.

    Attributes:
        config: holds ``block_size``, the context.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_size=block_size)

    def generate(self, ids: Tensor, length: int) -> Tensor:
        """Append ``length`` sampled characters to ids (B, T)."""
        raise NotImplementedError


class ReferenceHead(nn.Module):
    """One head of attention with maps of its own; scores are scaled by the embedding's size, as published."""

    def __init__(self, n_embd: int, head_size: int, block_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(n_embd, head_size, bias=False) for _ in range(3))
        self.register_buffer("seen", torch.ones(block_size, block_size).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of attention, (B, T, head_size), for x, (B, T, C)."""
        T, C = x.shape[1:]
        scores = self.query(x) @ self.key(x).transpose(1, 2) * C**-0.5
        scores = scores.masked_fill(self.get_buffer("seen")[:T, :T] == 0, -math.inf)
        return scores.softmax(-1) @ self.value(x)


class ReferenceBlock(nn.Module):
    """Pre-norm block: heads in a list, one after the other, then the feed-forward layer."""

    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ReferenceHead(n_embd, n_embd // n_head, block_size) for _ in range(n_head))
        self.project = nn.Linear(n_embd, n_embd)
        self.feed = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block, (B, T, C)."""
        y = self.norm1(x)
        x = x + self.project(torch.cat([head(y) for head in self.heads], -1))
        return x + self.feed(self.norm2(x))


class Reference(Peer):
    """The reference algorithm: the GPT of the published lecture scripts, in single precision."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__(block_size)
        self.characters = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(ReferenceBlock(n_embd, n_head, block_size) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, (B, T, V), of ids, (B, T)."""
        x = self.characters(ids) + self.positions.weight[: ids.size(1)]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, ids: Tensor, length: int) -> Tensor:
        """Read the whole context again for each character."""
        for _ in range(length):
            logits = self(ids[:, -self.config.block_size :])[:, -1]
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), 1)
        return ids


class HuggingFace(Peer):
    """Hugging Face's GPT-2 of a given size, without dropout.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__(block_size)
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, (B, T, V), of ids, (B, T)."""
        return self.model(ids, use_cache=False).logits

    def generate(self, ids: Tensor, length: int) -> Tensor:
        """Write with the library's own loop and cache."""
        sizes = {"max_new_tokens": length, "min_new_tokens": length}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **sizes)


class XTransformers(Peer):
    """x-transformers' decoder of a given size, as its README builds one for speed: the flash kernel, rotary positions.

    Raises:
        ImportError: x-transformers is not installed.
    """

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__(block_size)
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        layers = Decoder(
            dim=n_embd, depth=n_layer, heads=n_head, attn_dim_head=n_embd // n_head, attn_flash=True,
            rotary_pos_emb=True,
        )  # fmt: skip
        self.model = TransformerWrapper(num_tokens=vocab_size, max_seq_len=block_size, attn_layers=layers)
        self.writer = AutoregressiveWrapper(self.model)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, (B, T, V), of ids, (B, T)."""
        return self.model(ids)

    def generate(self, ids: Tensor, length: int) -> Tensor:
        """Write with the library's own loop and cache."""
        return torch.cat((ids, self.writer.generate(ids, length, filter_kwargs={"frac_num_tokens": 1.0})), 1)


def random_windows(tokens: Tensor, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return ids and targets, (B, T), at random places."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,), device=tokens.device)
    windows = tokens[starts[:, None] + torch.arange(block_size + 1, device=tokens.device)].long()
    return windows[:, :-1], windows[:, 1:]


def nats(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


class ReferenceTraining:
    """The reference's training: Adam at a constant 3e-4, in single precision."""

    def __init__(self, model: nn.Module, tokens: Tensor, batch_size: int, block_size: int) -> None:
        self.model, self.tokens, self.shape = model, tokens, (batch_size, block_size)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step(self, step: int) -> None:  # noqa: ARG002 - the rate is constant
        """Train one step."""
        loss = nats(self.model, *random_windows(self.tokens, *self.shape))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class NanoGPTTraining:
    """nanoGPT's documented recipe for a small machine (its README and config/train_shakespeare_char.py).

    AdamW with betas 0.9 and 0.99, weight decay 0.1 on matrices, 100 steps of warm-up to 1e-3, a cosine to 1e-4 at
    step 2,000 and on at that; gradients clipped at 1. Mixed precision where ``dtype`` is bfloat16.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, batch_size: int, block_size: int, dtype: torch.dtype) -> None:
        self.model, self.tokens, self.shape, self.dtype = model, tokens, (batch_size, block_size), dtype
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def step(self, step: int) -> None:
        """Train one step."""
        with torch.autocast(self.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = nats(self.model, *random_windows(self.tokens, *self.shape))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @staticmethod
    def learning_rate(step: int) -> float:
        """Return the learning rate of a step, from 0."""
        if step < 100:
            return 1e-3 * (step + 1) / 101
        done = min(1.0, (step - 100) / 1900)
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
