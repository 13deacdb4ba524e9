"""The decoder's arithmetic as one C++ function, native.cpp, compiled for this processor where it is first wanted.

torch computes a character in some two hundred operations of a few microseconds each. Here they are one, in which the
threads wait for each other where a layer needs it, and the weights are read once. Sums are in float32 and of one order
each, whatever is read beside them: a text is bitwise the same in any company. Where the processor multiplies pairs of
bfloat16 numbers (AVX512-BF16) faster than one by one, it does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from ctypes import POINTER, byref, c_int64, c_void_p
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.errors import UserError
from minigpt.generation.decoder import Decoder, KVCache
from minigpt.model import GPT, Linear, Norm
from minigpt.quantize import Weights, quantize_int8
from minigpt.runtime.cpu import cpu_info
from minigpt.runtime.device import bfloat16_at_half_rate

SOURCE = Path(__file__).with_suffix(".cpp")

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")

BLOCK = 64
"""Outputs of a linear map whose weights lie side by side; as in native.cpp."""

PAYS_FROM = 5_000
"""Characters, one after the other, from which on compiling takes less time than it saves: about a millisecond each."""

Compile = Literal["auto", "always", "never", "kept"]


class NotCompiledError(Exception):
    """There is no compiled decoder for this processor."""


def library(build: bool = True) -> Path:
    """The compiled file for this processor, in the user's cache folder; where it is missing, it is made in seconds.

    Args:
        build: whether it is made.

    Raises:
        NotCompiledError: it is missing, and is not to be made or cannot be.
    """
    flags = (*FLAGS, *(("-mno-avx512bf16",) if bfloat16_at_half_rate() else ()))
    features = cpu_info("flags", "Features")
    made_from = "\n".join((SOURCE.read_text(encoding="utf-8"), *flags, platform.machine(), features))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    path = folder / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    if not build:
        raise NotCompiledError("it is not compiled yet")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise NotCompiledError(f"there is no C++ compiler {os.environ.get('CXX', 'g++')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            ran = subprocess.run([compiler, *flags, "-o", made, SOURCE], check=False, capture_output=True, text=True)
            if ran.returncode:
                raise NotCompiledError(f"{compiler} fails: {(ran.stderr.splitlines() or ['without a word'])[0]}")
            made.replace(path)
    except OSError as error:
        raise NotCompiledError(f"{error.filename}: {error.strerror}") from None
    return path


def decoder(model: GPT, weights: Weights, how: Compile = "never", characters: int = 0) -> Decoder:
    """The decoder for ``sample.compile``.

    Args:
        model: as for :class:`Decoder`.
        weights: likewise.
        how: ``always`` is a :class:`NativeDecoder`; ``auto`` is one where that pays; ``kept`` where it was made before.
        characters: how many will be written one after the other.

    Raises:
        UserError: there is no compiled one, and ``always`` insists.
    """
    on_cpu = model.embedding.weight.device.type == "cpu"
    wanted = {"always": True, "never": False, "kept": on_cpu, "auto": on_cpu and characters >= PAYS_FROM}
    if not wanted[how]:
        return Decoder(model, weights)
    try:
        if not on_cpu:
            raise NotCompiledError("it computes on a CPU alone")
        return NativeDecoder(model, weights, library(build=how != "kept"))
    except NotCompiledError as error:
        if how == "always":
            raise UserError(f"sample.compile: no compiled decoder: {error}; set it to auto or never") from None
        if how == "auto":
            print(f"minigpt: no compiled decoder: {error}; goes on without", file=sys.stderr)
        return Decoder(model, weights)


class _Linear(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "units", "bias")] + [("inputs", c_int64), ("outputs", c_int64)]


class _Norm(ctypes.Structure):
    _fields_ = [("scale", c_void_p), ("shift", c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Norm) for name in ("norm1", "norm2")] + [(n, _Linear) for n in ("qkv", "out", "up", "down")]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)), ("table", c_void_p), ("positions", c_void_p), ("norm", _Norm), ("head", _Linear),
        *((name, c_int64) for name in (
            "n_layer", "n_head", "head_size", "n_embd", "hidden", "taps", "vocabulary", "window", "activation",
            "embd_norm", "qk_norm",
        )),
    ]  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("ids", "cos", "sin", "kv", "logits")] + [
        (name, c_int64) for name in ("batch", "count", "width", "slots", "first", "position", "predicted")
    ]


class NativeDecoder(Decoder):
    """A decoder whose reading is one compiled function.

    With rounded weights, keys and values are bfloat16, and so is what is multiplied in pairs; all else is float32.

    Args:
        model: on a CPU; float64 with weights float32 alone.
        weights: as for :class:`Decoder`.
        path: :func:`library`.

    Raises:
        NotCompiledError: the file cannot be loaded.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, weights: Weights, path: Path) -> None:
        super().__init__(model, "float32")
        config = model.config
        name = "float64" if self.dtype == torch.float64 else weights
        self.kv_dtype = torch.bfloat16 if weights != "float32" else self.dtype
        try:
            self.function: Callable[..., None] = ctypes.CDLL(str(path))[f"read_{name}"]
        except OSError as error:
            raise NotCompiledError(str(error)) from None
        self.weights, self.kept = weights, list[Tensor]()
        layers = [
            _Layer(
                self._norm(block.norm1), self._norm(block.norm2),
                self._linear(block.attention.qkv), self._linear(block.attention.out),
                self._linear(block.feed_forward.up), self._linear(block.feed_forward.down),
            )
            for block in model.blocks
        ]  # fmt: skip
        positions = self._at(model.position.weight) if config.positions == "learned" else None
        self.arguments = _Model(
            (_Layer * len(layers))(*layers), self._at(self.table), positions, self._norm(model.norm),
            self._linear(model.head), config.n_layer, config.n_head, config.head_size, config.n_embd,
            model.blocks[0].feed_forward.down.in_features, config.embd_conv, model.vocab_size, self.window,
            ("relu", "relu2", "gelu", "swiglu").index(config.activation), config.embd_norm, config.qk_norm,
        )  # fmt: skip

    def _at(self, tensor: Tensor) -> int:
        """The address of the tensor's numbers, which are kept."""
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def _norm(self, norm: Norm) -> _Norm:
        return _Norm(*(None if part is None else self._at(part) for part in (norm.weight, norm.bias)))

    def _linear(self, linear: Linear) -> _Linear:
        weight, units, per = linear.weight.detach(), None, 1
        missing = -len(weight) % BLOCK
        if self.weights == "int8":
            weight, rowwise = quantize_int8(weight)
            units, per = self._at(F.pad(rowwise.to(self.dtype), (0, missing))), 4
        elif self.weights == "bfloat16":
            weight, per = weight.bfloat16(), 2
        filled = F.pad(weight, (0, -linear.in_features % per, 0, missing))
        blocks = filled.view(-1, BLOCK, filled.size(1) // per, per).transpose(1, 2)
        bias = None if linear.bias is None else self._at(linear.bias)
        return _Linear(self._at(blocks), units, bias, linear.in_features, linear.out_features)

    @torch.inference_mode()
    def read(self, ids: Tensor, cache: KVCache, num_logits: int = 1) -> Tensor:
        """As :meth:`Decoder.read`."""
        B, T = ids.shape
        cache.make_room(T)
        cache.ids.narrow(1, cache.before + cache.used, T).copy_(ids)
        cos, sin = (part.data_ptr() for part in turn) if (turn := self.turn(cache.length, T)) else (None, None)
        logits = torch.empty(B, num_logits, self.model.vocab_size, dtype=self.dtype)
        call = _Call(
            cache.ids.data_ptr(), cos, sin, cache.kv.data_ptr(), logits.data_ptr(), B, T, cache.ids.size(1),
            cache.slots, cache.used, cache.length, num_logits,
        )  # fmt: skip
        self.function(byref(self.arguments), byref(call))
        cache.length += T
        cache.used += T
        return logits
