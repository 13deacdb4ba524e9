"""KV cache for incremental decoding: the keys and values of the characters that a model has read.

``GPT.forward(ids, cache)`` reads characters after those in the cache and adds them. Shapes: B sequences, H heads of
S = head_size channels, C = n_embd.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.ops import causal_mask
from minigpt.params import ModelParams


@dataclass
class CacheSlice:
    """The part of a cache that a forward pass of T new characters writes and reads."""

    positions: slice | Tensor  # of the new characters in their sequences; as a tensor, int64 (T,)
    slots: slice | Tensor  # where their keys and values are stored, likewise
    visible: tuple[int, int]  # slots that they attend to: the first, and their number
    mask: Tensor | None  # 0 and -inf, (T, visible slots); None if all visible slots are attended to


@dataclass
class ConvState:
    """Vectors of the last characters, (B, taps - 1, C), which a causal convolution reads again."""

    vectors: Tensor

    def join(self, x: Tensor) -> Tensor:
        """Return these vectors followed by those of new characters, (B, T, C), and keep the last of them."""
        joined = torch.cat((self.vectors.to(x.dtype), x), 1)
        self.vectors.copy_(joined[:, x.size(1) :])
        return joined


@dataclass
class LayerCache:
    """Keys and values of one layer, each (B, H, slots, S), and the last inputs of its feed-forward layer."""

    keys: Tensor
    values: Tensor
    current: CacheSlice
    mlp_conv: ConvState

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new characters, (B, H, T, S), and return those of all visible slots."""
        return self._store(self.keys, k), self._store(self.values, v)

    def _store(self, stored: Tensor, new: Tensor) -> Tensor:
        slots = self.current.slots
        if isinstance(slots, Tensor):
            stored.index_copy_(2, slots, new)
        else:
            stored.narrow(2, slots.start, new.size(2)).copy_(new)
        return stored.narrow(2, *self.current.visible)


class KVCache:
    """Keys and values of the last characters of B sequences of equal length, in order.

    When more than ``slots`` characters are read, those that no later one attends to are dropped. ``length`` counts the
    characters since the last :meth:`clear`. ``mlp_inputs`` are the last ones of each feed-forward layer, (n_layer, B,
    mlp_conv - 1, C). ``conv_tensors`` has all vectors that convolutions read again, which a forward pass overwrites.
    """

    def __init__(
        self, config: ModelParams, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.batch_size, self.slots, self.dtype, self.device = batch_size, slots, dtype, device
        self.window = config.window
        shape = (config.n_layer, 2, batch_size, config.n_head, slots, config.head_size)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.current = CacheSlice(slice(0, 0), slice(0, 0), (0, slots), None)
        wide, C = torch.promote_types(dtype, torch.float32), config.n_embd
        embeddings = torch.zeros(batch_size, config.embd_conv - 1, C, dtype=wide, device=device)
        self.mlp_inputs = torch.zeros(config.n_layer, batch_size, config.mlp_conv - 1, C, dtype=wide, device=device)
        self.conv_tensors = (embeddings, self.mlp_inputs)
        self.embedding_conv = ConvState(embeddings)
        self.layers = [
            LayerCache(self.kv[n, 0], self.kv[n, 1], self.current, ConvState(self.mlp_inputs[n]))
            for n in range(config.n_layer)
        ]
        self._masks: dict[tuple[int, int], Tensor] = {}
        self.length = self.used = 0

    def clear(self) -> None:
        """Forget all characters."""
        for vectors in self.conv_tensors:
            vectors.zero_()
        self.length = self.used = 0

    def make_room(self, count: int) -> None:
        """Drop the oldest characters if ``count`` more do not fit; ``count`` is at most ``slots + 1 - window``."""
        if self.used + count > self.slots:
            self._drop(self.used - min(self.used, self.window - 1))

    def reserve(self, count: int) -> CacheSlice:
        """Make room for ``count`` new characters and return their slice."""
        self.make_room(count)
        first, current = self.used, self.current
        begin, end = max(0, first + 1 - self.window), first + count
        current.positions = slice(self.length, self.length + count)
        current.slots = slice(first, end)
        current.visible = begin, end - begin
        current.mask = self._mask(count, end - begin) if count > 1 else None
        return current

    def _mask(self, count: int, visible: int) -> Tensor:
        """Return the mask of the last ``count`` of ``visible`` characters; only the latest one is kept in memory."""
        if (count, visible) not in self._masks:
            mask = causal_mask(visible, self.window, count)
            self._masks = {(count, visible): mask.to(self.device, self.dtype)}
        return self._masks[count, visible]

    def advance(self, count: int) -> None:
        """Count ``count`` characters as read, after their keys and values were stored."""
        self.length += count
        self.used += count

    def _drop(self, count: int) -> None:
        """Drop the first ``count`` characters."""
        kept = self.used - count
        self.kv[..., :kept, :] = self.kv[..., count : self.used, :].clone()
        self.used = kept
