"""Loss scaling for float16, whose smallest number is 6e-8: smaller gradients would become 0."""

import torch
from torch import Tensor

from minigpt.training.checkpoint import TrainState

# Those of torch.amp.GradScaler.
GROWTH, BACKOFF, GROWTH_STEPS = 2.0, 0.5, 2000
MIN_SCALE, MAX_SCALE = 1.0, 2.0**24


class LossScale:
    """Factor of the loss, and thus of all gradients: halved when a gradient overflows, doubled after many good steps.

    It is a part of the training's state, so that a resumed training uses the same factors.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def unscale(self, grads: list[Tensor]) -> None:
        """Divide gradients by the factor, in float32."""
        torch._foreach_mul_(grads, 1 / self._state.loss_scale)

    def update(self, finite: bool) -> bool:
        """Choose the next factor by whether the gradients were finite. Return whether a smaller factor may help."""
        state = self._state
        if finite:
            state.good_steps += 1
            if state.good_steps >= GROWTH_STEPS:
                state.loss_scale, state.good_steps = min(MAX_SCALE, state.loss_scale * GROWTH), 0
            return True
        could_shrink = state.loss_scale > MIN_SCALE
        state.loss_scale, state.good_steps = max(MIN_SCALE, state.loss_scale * BACKOFF), 0
        return could_shrink
