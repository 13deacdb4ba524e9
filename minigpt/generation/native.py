"""Compiled decoder for a CPU: the forward pass of a few characters as one C++ function, native.cpp.

torch computes a character in some two hundred operations of a few microseconds each. Here they are one, in which
threads wait for each other only where a layer requires it, and weights are read once. Sums are in float32 and each has
one order, whatever is computed next to it: a text is bitwise the same in any batch. On processors that multiply pairs
of bfloat16 numbers (AVX512-BF16) faster than single ones, it does so.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.cache import KVCache
from minigpt.errors import UserError
from minigpt.generation.compiler import NotCompiledError, build_in_background, build_library, is_intact, library_path
from minigpt.model import GPT, Linear, Norm, rotary_angles
from minigpt.params import Compile, ModelParams
from minigpt.quantize import WeightDtype, quantize_int8

ACTIVATIONS = ("relu", "relu2", "gelu", "swiglu")
"""Activations that native.cpp implements, in the order of its constants."""

BLOCK = 64
"""Outputs of a linear map whose weights are next to each other; as in native.cpp."""

PAYS_FROM = 5_000
"""Characters, written one after the other, above which compiling takes less time than it saves (1 ms each)."""


def compile_model(model: GPT, dtype: WeightDtype, mode: Compile, characters: int = 0) -> NativeGPT | None:
    """Return the compiled decoder for ``sample.compile``, or None if PyTorch is to be used.

    ``always`` compiles if necessary. ``auto`` uses the file that was compiled before, compiles first if ``characters``,
    the number to write one after the other, make it worth the wait, and else compiles in the background for next time.

    Raises:
        UserError: the mode is ``always``, and the decoder cannot be compiled.
    """
    on_cpu = model.embedding.weight.device.type == "cpu"
    if mode == "never" or (mode == "auto" and not on_cpu):
        return None
    try:
        if not on_cpu:
            raise NotCompiledError("it runs on a CPU only")
        if model.config.activation not in ACTIVATIONS:
            raise NotCompiledError(f"it does not implement model.activation = {model.config.activation}")
        if mode == "auto" and characters < PAYS_FROM and not is_intact(library_path()):
            build_in_background()
            return None
        return NativeGPT(model, dtype, build_library())
    except NotCompiledError as error:
        if mode == "always":
            raise UserError(f"sample.compile: no compiled decoder: {error}; set it to auto or never") from None
        _report_once(str(error))
        return None


@functools.cache
def _report_once(reason: str) -> None:
    print(f"minigpt: no compiled decoder: {reason}; PyTorch writes the text", file=sys.stderr)


class _Linear(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "scales", "bias")] + [("inputs", c_int64), ("outputs", c_int64)]


class _Norm(ctypes.Structure):
    _fields_ = [("scale", c_void_p), ("shift", c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        ("conv", c_void_p),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)), ("table", c_void_p), ("positions", c_void_p), ("norm", _Norm), ("head", _Linear),
        *((name, c_int64) for name in (
            "n_layer", "n_head", "head_size", "n_embd", "hidden", "taps", "recent", "vocabulary", "window",
            "activation", "embd_norm", "qk_norm",
        )),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("ids", "cos", "sin", "kv", "recent", "logits")] + [
        (name, c_int64) for name in ("batch", "count", "width", "slots", "first", "position", "num_logits")
    ]


class NativeCache(KVCache):
    """KV cache of the compiled decoder, which looks the convolution over the embeddings up by character.

    ``ids`` are the characters in the slots, after embd_conv - 1 earlier ones: int64 (B, embd_conv - 1 + slots). The id
    ``padding`` stands for no character and has an embedding of zeros.
    """

    def __init__(self, config: ModelParams, batch_size: int, slots: int, dtype: torch.dtype, padding: int) -> None:
        super().__init__(config, batch_size, slots, dtype, torch.device("cpu"))
        self.earlier, self.padding = config.embd_conv - 1, padding
        self.ids = torch.full((batch_size, self.earlier + slots), padding, dtype=torch.int64)

    def clear(self) -> None:
        """Forget all characters."""
        super().clear()
        self.ids[:, : self.earlier] = self.padding

    def _drop(self, count: int) -> None:
        kept = self.ids[:, count : self.earlier + self.used].clone()
        super()._drop(count)
        self.ids[:, : kept.size(1)] = kept


class NativeGPT:
    """A model that reads with the compiled function.

    With quantized weights, keys and values are bfloat16, and so are the inputs of products of pairs; all else is
    float32. ``model`` is on a CPU; float64 only with weights of dtype float32, which leaves them as they are.

    Raises:
        NotCompiledError: the compiled file ``library`` cannot be loaded.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: WeightDtype, library: Path) -> None:
        self.config, self.vocab_size, self.weight_dtype = model.config, model.vocab_size, dtype
        self.dtype = model.embedding.weight.dtype
        config, name = model.config, "float64" if self.dtype == torch.float64 else dtype
        try:
            self.function: Callable[..., None] = ctypes.CDLL(str(library))[f"forward_{name}"]
        except (OSError, AttributeError) as error:
            raise NotCompiledError(str(error)) from None
        self.tensors = list[Tensor]()
        # A row for each character at each tap of the convolution, the newest last, and a row of zeros for none.
        rows = F.pad(model.embedding.weight, (0, 0, 0, 1))
        taps = [*model.conv.flip(0), torch.ones_like(rows[0])] if config.embd_conv > 1 else [torch.ones_like(rows[0])]
        layers = [
            _Layer(
                self._norm(block.norm1), self._norm(block.norm2),
                self._linear(block.attention.qkv), self._linear(block.attention.out),
                self._linear(block.feed_forward.up), self._linear(block.feed_forward.down),
                self._address(block.conv.flip(0)) if block.has_conv else None,
            )
            for block in model.blocks
        ]  # fmt: skip
        self.rotary = self._rotary(2 * config.block_size) if config.positions == "rotary" else None
        positions = None if self.rotary else self._address(model.position.weight)
        self.model = _Model(
            (_Layer * len(layers))(*layers), self._address(torch.cat([rows * tap for tap in taps])), positions,
            self._norm(model.norm), self._linear(model.head), config.n_layer, config.n_head, config.head_size,
            config.n_embd, model.blocks[0].feed_forward.down.in_features, config.embd_conv,
            config.mlp_conv - 1, model.vocab_size, config.window,
            ACTIVATIONS.index(config.activation), config.embd_norm, config.qk_norm,
        )  # fmt: skip

    def make_cache(self, batch_size: int, slots: int | None = None) -> NativeCache:
        """Return an empty cache, as :meth:`minigpt.model.GPT.make_cache`."""
        dtype = self.dtype if self.weight_dtype == "float32" else torch.bfloat16
        return NativeCache(self.config, batch_size, slots or self.config.block_size, dtype, self.vocab_size)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache, num_logits: int | None = None) -> Tensor:
        """Return what :meth:`GPT.forward` returns for ids (B, T)."""
        assert isinstance(cache, NativeCache)  # noqa: S101 - for the type checker: make_cache made it
        B, T = ids.shape
        count = T if num_logits is None else num_logits
        cache.make_room(T)
        cache.ids.narrow(1, cache.earlier + cache.used, T).copy_(ids)
        cos, sin = self._angles(cache.length, T)
        logits = torch.empty(B, count, self.vocab_size, dtype=self.dtype)
        call = _Call(
            cache.ids.data_ptr(), cos, sin, cache.kv.data_ptr(), cache.mlp_inputs.data_ptr(), logits.data_ptr(), B, T,
            cache.ids.size(1), cache.slots, cache.used, cache.length, count,
        )  # fmt: skip
        self.function(byref(self.model), byref(call))
        cache.advance(T)
        return logits

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_angles(self.config, length)
        return cos.to(self.dtype), sin.to(self.dtype)

    def _angles(self, start: int, count: int) -> tuple[int | None, int | None]:
        """Return the addresses of cosines and sines of the angles from position ``start``."""
        if not self.rotary:
            return None, None
        if start + count > len(self.rotary[0]):
            self.rotary = self._rotary(2 * (start + count))
        cos, sin = self.rotary
        offset = start * cos.size(1) * cos.element_size()
        return cos.data_ptr() + offset, sin.data_ptr() + offset

    def _address(self, tensor: Tensor) -> int:
        """Keep a tensor alive and return the address of its numbers."""
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def _norm(self, norm: Norm) -> _Norm:
        return _Norm(*(None if part is None else self._address(part) for part in (norm.weight, norm.bias)))

    def _linear(self, linear: Linear) -> _Linear:
        """Lay the weight out in blocks of BLOCK outputs, padded with zeros."""
        weight, scales, per = linear.weight.detach(), None, 1
        missing = -len(weight) % BLOCK
        if self.weight_dtype == "int8":
            weight, rowwise = quantize_int8(weight)
            scales, per = self._address(F.pad(rowwise.to(self.dtype), (0, missing))), 4
        elif self.weight_dtype == "bfloat16":
            weight, per = weight.bfloat16(), 2
        filled = F.pad(weight, (0, -linear.in_features % per, 0, missing))
        blocks = filled.view(-1, BLOCK, filled.size(1) // per, per).transpose(1, 2)
        bias = None if linear.bias is None else self._address(linear.bias)
        return _Linear(self._address(blocks), scales, bias, linear.in_features, linear.out_features)
