"""Single characters on a GPU through a CUDA graph: one launch instead of some hundred, which take longer than the work.

The graph wraps ``GPT.forward``. Everything that changes from character to character is in tensors at fixed addresses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.cache import CacheSlice, KVCache
from minigpt.model import GPT
from minigpt.ops import is_hidden

STEPS_BEFORE_CAPTURE = 16
"""Characters read one at a time before the graph is captured, which takes as long as a few dozen of them."""


class GraphCache(KVCache):
    """KV cache whose slice for one character can be given by tensors: next_ids (B, 1), slot (1,) and position (1,).

    The cache owns the captured graph, and nothing that the graph refers to owns the cache: in a reference cycle it
    would be destroyed at any garbage collection, which must not happen during a capture. ``logits`` is its result.
    """

    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor

    def __init__(self, model: GPT, batch_size: int, slots: int) -> None:
        device = model.embedding.weight.device
        super().__init__(model.config, batch_size, slots, model.cache_dtype, device)
        self.next_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.slot)
        self.columns = torch.arange(slots, device=device)
        self.steps = 0
        self.captured_cos: Tensor | None = None
        self._from_tensors = False

    @contextmanager
    def from_tensors(self, ids: Tensor) -> Iterator[None]:
        """Within the block, ``reserve(1)`` depends on tensors alone, set for ids (B, 1); nothing counts as read."""
        self.make_room(1)
        self.next_ids.copy_(ids)
        self.slot.fill_(self.used)
        self.position.fill_(self.length)
        self._from_tensors = True
        try:
            yield
        finally:
            self._from_tensors = False

    def reserve(self, count: int) -> CacheSlice:
        """Return the slice for new characters."""
        if not self._from_tensors:
            return super().reserve(count)
        current = self.current
        hidden = is_hidden(self.slot, self.columns, self.window)
        current.mask = torch.zeros_like(self.columns, dtype=self.dtype).masked_fill(hidden, -torch.inf)[None]
        current.positions, current.slots, current.visible = self.position, self.slot, (0, self.slots)
        return current

    def advance(self, count: int) -> None:
        """Count characters as read."""
        if not self._from_tensors:
            super().advance(count)


class GraphedGPT:
    """A model on a GPU, in evaluation mode, that reads single characters through a CUDA graph."""

    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    """The stream for all captures of a device: libraries keep memory for each stream in use."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN makes a new plan, in 30 ms, for every number of keys

    def make_cache(self, batch_size: int, slots: int | None = None) -> GraphCache:
        """Return an empty cache, as :meth:`minigpt.model.GPT.make_cache`."""
        return GraphCache(self.model, batch_size, slots or self.model.config.block_size)

    def __call__(self, ids: Tensor, cache: KVCache, num_logits: int | None = None) -> Tensor:
        """Return what :meth:`GPT.forward` returns. For a single character it is valid until the next call."""
        if not isinstance(cache, GraphCache) or ids.size(1) > 1:
            return self.model(ids, cache, num_logits)
        cache.steps += 1
        if cache.steps <= STEPS_BEFORE_CAPTURE:
            return self.model(ids, cache)
        self.model.extend_rotary(cache.length + 1)
        with cache.from_tensors(ids):
            cos = getattr(self.model, "cos", None)
            if cache.graph is None or cache.captured_cos is not cos:  # a longer table has another address
                with torch.cuda.device(ids.device):  # each thread has a current device, first number 0
                    cache.graph, cache.captured_cos = self._capture(cache), cos
            cache.graph.replay()
        cache.advance(1)
        return cache.logits

    def _capture(self, cache: GraphCache) -> torch.cuda.CUDAGraph:
        """Return a graph of the forward pass that writes to ``cache.logits``."""
        stream = self.streams.setdefault(cache.next_ids.device, torch.cuda.Stream())
        kept = [vectors.clone() for vectors in cache.conv_tensors]  # all that a forward pass overwrites
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # the first calls of libraries set up state, which must not be captured
                self.model(cache.next_ids, cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            cache.logits = self.model(cache.next_ids, cache)
        for vectors, before in zip(cache.conv_tensors, kept, strict=True):
            vectors.copy_(before)
        return graph
