"""The model as it is read when it writes: the new characters alone, with keys and values of the earlier ones kept.

What is computed is what GPT.forward computes at the last positions of the whole sequence, and tests hold the two
together. Weights are packed once, in the form in which the hardware multiplies a few rows fastest.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model import GPT, Block, rotary_angles
from minigpt.ops import activate, causal_mask
from minigpt.params import ModelParams as Config
from minigpt.quantize import Weights, normalised, packed

STEPS_BEFORE_CAPTURE = 16
"""Characters read one at a time before that is captured as a CUDA graph, which takes as long as some dozen."""


@dataclass(frozen=True)
class CacheSlice:
    """Where T new characters go in a cache, and what they look at.

    Attributes:
        count: characters T.
        first: the slot of the first.
        begin: the slot of the earliest character that any of them looks at.
        mask: 0 and -inf, (T, slots looked at); None where all are seen.
        turn: cosines and sines of the rotary angles, each (T, S), the sines' first half negated; None without.
        slot: of one new character, as a tensor (1,) that may change from call to call; then all slots are looked at,
            and the mask hides the others.
    """

    count: int
    first: int
    begin: int
    mask: Tensor | None
    turn: tuple[Tensor, Tensor] | None
    slot: Tensor | None = None

    def put(self, slots: Tensor, new: Tensor) -> Tensor:
        """Write keys or values of the new characters, (B, H, T, S), to their slots; gives all that are looked at."""
        if self.slot is not None:
            return slots.index_copy_(2, self.slot, new)
        slots.narrow(2, self.first, self.count).copy_(new)
        return slots.narrow(2, self.begin, self.first + self.count - self.begin)


class Layer:
    """A transformer block over new characters."""

    def __init__(self, block: Block, config: Config, weights: Weights, dtype: torch.dtype) -> None:
        self.config = config
        self.norm1, self.norm2 = normalised(block.norm1, dtype), normalised(block.norm2, dtype)
        self.qkv, self.out = packed(block.attention.qkv, weights), packed(block.attention.out, weights)
        self.up, self.down = packed(block.feed_forward.up, weights), packed(block.feed_forward.down, weights)

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, place: CacheSlice) -> Tensor:
        """Residual stream (B T, C) -> (B T, C); the characters' keys and values go to the slots, (B, H, slots, S)."""
        H, S = self.config.n_head, self.config.head_size
        qkv = self.qkv(self.norm1(x)).view(-1, place.count, 3, H, S).permute(2, 0, 3, 1, 4)
        qk, (v,) = qkv.to(keys.dtype).split((2, 1))  # (2, B, H, T, S) and (1, B, H, T, S)
        if self.config.qk_norm:
            qk = F.layer_norm(qk, (S,))
        if place.turn:
            cos, sin = place.turn
            qk = torch.addcmul(qk * cos, qk.roll(S // 2, -1), sin)
        q, k = qk.unbind()
        y = F.scaled_dot_product_attention(q, place.put(keys, k), place.put(values, v), place.mask)
        x = x + self.out(y.transpose(1, 2).reshape(-1, H * S).to(x.dtype))
        return x + self.down(activate(self.up(self.norm2(x)), self.config.activation))


class KVCache:
    """What has been read of B sequences of equal length: ids, keys and values of their last characters, in order.

    Args:
        decoder: the reader.
        batch_size: sequences B.
        slots: characters that fit; when more are read, those that no later one looks at make room.

    Attributes:
        length: how many characters have been read.
    """

    def __init__(self, decoder: Decoder, batch_size: int, slots: int) -> None:
        config, device = decoder.model.config, decoder.model.embedding.weight.device
        shape = (config.n_layer, 2, batch_size, config.n_head, slots, config.head_size)
        self.kv = torch.zeros(shape, dtype=decoder.kv_dtype, device=device)
        self.layers = [(layer[0], layer[1]) for layer in self.kv]
        self.before = config.embd_conv - 1
        self.ids = torch.empty(batch_size, self.before + slots, dtype=torch.int64, device=device)
        self.nothing = decoder.model.vocab_size
        self.window, self.slots = decoder.window, slots
        self.step: Step | None = None
        self.mask = causal_mask(slots, decoder.window).to(device, decoder.kv_dtype)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.ids[:, : self.before] = self.nothing
        self.length = self.used = 0

    def unread(self, count: int) -> None:
        """Forget the last ``count`` characters, at most those since room was made."""
        self.length -= count
        self.used -= count

    def make_room(self, count: int) -> None:
        """Free slots for ``count`` characters more, at most slots + 1 - window."""
        if self.used + count > self.slots:
            kept = min(self.used, self.window - 1)
            self.kv[..., :kept, :] = self.kv[..., self.used - kept : self.used, :].clone()
            self.ids[:, : self.before + kept] = self.ids[:, self.used - kept : self.before + self.used].clone()
            self.used = kept

    def place(self, count: int, turn: tuple[Tensor, Tensor] | None) -> CacheSlice:
        """The place of ``count`` new characters."""
        first, begin = self.used, max(0, self.used + 1 - self.window)
        mask = self.mask[first - begin : first - begin + count, : first + count - begin] if count > 1 else None
        return CacheSlice(count, first, begin, mask, turn)


class Step:
    """Reading one character as a CUDA graph: one launch in place of some hundred, which take longer than the work.

    All that changes from character to character lies in tensors that stay where they are.
    """

    stream: ClassVar[torch.cuda.Stream | None] = None
    """Where graphs are captured, one for all: libraries keep memory for each stream that they have seen."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        # The cache owns its step: of a cycle, the graph would be destroyed whenever garbage is next collected, which
        # must not be while another is captured.
        self.decoder, self.cache = decoder, weakref.proxy(cache)
        device = cache.ids.device
        self.ids = cache.ids[:, :1].clone()
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.slot)
        self.turn = None if decoder.turn(0, 1) is None else tuple(part.clone() for part in decoder.turn(0, 1) or ())
        self.columns = torch.arange(cache.slots, device=device)
        self.taps = torch.arange(len(decoder.offsets), device=device)
        self.count = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def compute(self) -> Tensor:
        """Logits (B, 1, V), from the tensors alone."""
        cache = self.cache
        cache.ids.index_copy_(1, self.slot + cache.before, self.ids)
        near = cache.ids.index_select(1, self.slot + self.taps)[:, None]
        hidden = (self.columns > self.slot) | (self.columns <= self.slot - cache.window)
        mask = torch.zeros_like(self.columns, dtype=cache.kv.dtype).masked_fill(hidden, -torch.inf)[None]
        place = CacheSlice(1, 0, 0, mask, cast("tuple[Tensor, Tensor] | None", self.turn), self.slot)
        return self.decoder.compute(near, self.position, cache, place, 1)

    def load(self, ids: Tensor, place: CacheSlice) -> None:
        """Set the tensors for ids (B, 1) at ``place``."""
        self.ids.copy_(ids)
        self.slot.fill_(place.first)
        self.position.fill_(self.cache.length)
        for kept, now in zip(self.turn or (), place.turn or (), strict=True):
            kept.copy_(now)

    def read(self, ids: Tensor, place: CacheSlice) -> Tensor:
        """What :meth:`Decoder.read` gives for ids (B, 1) at ``place``; valid until the next call."""
        self.load(ids, place)
        self.count += 1
        if self.count <= STEPS_BEFORE_CAPTURE:
            return self.compute()
        self.graph = self.graph or self.capture()
        self.graph.replay()
        return self.logits

    def capture(self) -> torch.cuda.CUDAGraph:
        """The graph, which writes to ``logits``."""
        Step.stream = stream = Step.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what libraries set up at their first calls must not be captured
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = self.compute()
        return graph


class Decoder:
    """A model packed to read a few characters at a time.

    Args:
        model: on the device that is used; it is not changed.
        weights: what its linear maps are rounded to. With float32, activations have the model's dtype, else bfloat16.

    Attributes:
        window: how many characters a position looks at, itself among them.
        dtype: of activations.
        attention_dtype: in which attention is computed; at least float32 on a CPU, where bfloat16 takes torch 3 to 7
            times as long.
        kv_dtype: of keys and values as they are kept.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, weights: Weights = "float32") -> None:
        config = model.config
        self.model = model
        self.window = config.attention_window or config.block_size
        self.dtype = model.embedding.weight.dtype if weights == "float32" else torch.bfloat16
        on_gpu = model.embedding.weight.is_cuda
        if on_gpu:  # cuDNN plans anew, for some 30 ms, for every number of keys
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.attention_dtype = self.dtype if on_gpu or self.dtype != torch.bfloat16 else torch.float32
        self.kv_dtype = self.attention_dtype
        self.layers = [Layer(block, config, weights, self.dtype) for block in model.blocks]
        self.norm, self.head = normalised(model.norm, self.dtype), packed(model.head, weights)
        # One row for each character at each of the convolution's taps, the newest last, and a row of zeros for none.
        rows = F.pad(model.embedding.weight, (0, 0, 0, 1))
        taps = [*model.conv.flip(0), torch.ones_like(rows[0])] if config.embd_conv > 1 else [torch.ones_like(rows[0])]
        self.table = torch.cat([rows * tap for tap in taps])
        self.offsets = torch.arange(len(taps), device=rows.device) * len(rows)
        self.turns = self._turns(2 * config.block_size)

    def cache(self, batch_size: int, slots: int | None = None) -> KVCache:
        """An empty cache for ``batch_size`` sequences; with ``slots`` above the context, for ones longer than that."""
        return KVCache(self, batch_size, slots or self.model.config.block_size)

    @torch.inference_mode()
    def read(self, ids: Tensor, cache: KVCache, num_logits: int = 1) -> Tensor:
        """Read characters and add them to the cache.

        Args:
            ids: (B, T).
            cache: what has been read before.
            num_logits: at how many of the last positions logits are wanted.

        Returns:
            logits of what comes after each of those positions, (B, num_logits, V), in at least float32.
        """
        T = ids.size(1)
        cache.make_room(T)
        place = cache.place(T, self.turn(cache.length, T))
        if ids.is_cuda and T == 1:
            cache.step = cache.step or Step(self, cache)
            logits = cache.step.read(ids, place)
        else:
            taps = len(self.offsets)
            cache.ids.narrow(1, cache.before + cache.used, T).copy_(ids)
            near = cache.ids.narrow(1, cache.used, cache.before + T).unfold(1, taps, 1)
            positions = torch.arange(cache.length, cache.length + T, device=ids.device)
            logits = self.compute(near, positions, cache, place, num_logits)
        cache.length += T
        cache.used += T
        return logits

    def compute(self, near: Tensor, positions: Tensor, cache: KVCache, place: CacheSlice, num_logits: int) -> Tensor:
        """What :meth:`read` gives, from each character with those just before it, (B, T, taps), and positions (T,)."""
        B, T, _ = near.shape
        x = F.embedding(near + self.offsets, self.table).sum(2)
        if self.model.config.positions == "learned":
            x = x + F.embedding(positions, self.model.position.weight)
        x = self.model.embd_norm(x).flatten(0, 1).to(self.dtype)
        for layer, (keys, values) in zip(self.layers, cache.layers, strict=True):
            x = layer(x, keys, values, place)
        if num_logits < T:
            x = x.view(B, T, -1)[:, -num_logits:].flatten(0, 1)
        logits = self.head(self.norm(x)).view(B, num_logits, -1)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def turn(self, start: int, count: int) -> tuple[Tensor, Tensor] | None:
        """The rotary angles of characters ``start`` to ``start + count - 1``, as in :class:`CacheSlice`."""
        if self.model.config.positions == "learned":
            return None
        while start + count > len(self.turns[0]):
            self.turns = self._turns(2 * len(self.turns[0]))
        cos, sin = self.turns
        return cos[start : start + count], sin[start : start + count]

    def _turns(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary angles, both halves of the channels side by side, (length, S)."""
        cos, sin = rotary_angles(self.model.config, length)
        where, dtype = self.table.device, self.attention_dtype
        return torch.cat((cos, cos), 1).to(where, dtype), torch.cat((-sin, sin), 1).to(where, dtype)
