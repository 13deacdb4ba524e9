"""Tables of the choices that params.yaml offers by name.

An entry here is all that a new activation or schedule needs: params.yaml is validated against the tables, the model
and the optimizer look their function up, and a compiled decoder that does not know a name leaves the model to PyTorch.
params.yaml is checked before torch is imported, so functions of tensors are given by their import path.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Activation:
    """Activation of the feed-forward layer.

    Attributes:
        path: import path of a function of one tensor.
        maps: equal linear maps that the layer computes as its input. Gated activations take two, next to each other
            in the last dimension.
    """

    path: str
    maps: int = 1

    @property
    def function(self) -> Callable[[Any], Any]:
        """The function itself; importing it imports torch."""
        module, _, name = self.path.rpartition(".")
        function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
        return function


ACTIVATIONS = {
    "relu": Activation("torch.nn.functional.relu"),
    "relu2": Activation("minigpt.ops.squared_relu"),
    "gelu": Activation("torch.nn.functional.gelu"),
    "swiglu": Activation("minigpt.ops.swiglu", maps=2),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
"""From the fraction of the steps after the warm-up, in [0, 1], to the fraction of the way that the learning rate still
has to fall: 1 is its peak, 0 its end."""
