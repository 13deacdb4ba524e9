"""Tables of the choices that ``params.yaml`` offers by name.

A new activation or schedule needs one entry here. ``params.yaml`` is validated against the tables, and the model and
the optimizer look their functions up in them. A compiled decoder that does not implement a name leaves the model to
PyTorch. Params are validated before torch is imported, so functions of tensors are given by their import path.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Activation:
    """Activation function of the feed-forward layer: the import path of a function of one tensor.

    Its input is the output of ``maps`` linear maps, concatenated in the last dimension. Gated activations take two.
    """

    path: str
    maps: int = 1

    @property
    def function(self) -> Callable[[Any], Any]:
        """The function; the first access imports torch."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


ACTIVATIONS = {
    "relu": Activation("torch.nn.functional.relu"),
    "relu2": Activation("minigpt.ops.squared_relu"),
    "gelu": Activation("torch.nn.functional.gelu"),
    "swiglu": Activation("minigpt.ops.swiglu", maps=2),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
"""Learning rate from 1 (peak) to 0 (final), as a function of the progress after the warm-up, from 0 to 1."""
