import math

import pytest
import torch

from minigpt.choices import ACTIVATIONS, SCHEDULES

FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "swiglu": lambda x: x[..., :3] * torch.sigmoid(x[..., :3]) * x[..., 3:],
}
"""The plain formula of each activation, for 3 outputs."""

HALFWAY = {"constant": 1, "linear": 0.5, "cosine": 0.5}
"""The value of each schedule in the middle."""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_its_formula(name):
    activation = ACTIVATIONS[name]
    x = torch.linspace(-3, 3, 4 * 3 * activation.maps, dtype=torch.float64).view(4, -1)
    expected = FORMULAS[name](x)
    assert expected.shape == (4, 3)
    torch.testing.assert_close(activation.function(x), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_falls_from_the_peak_to_its_end(name):
    schedule = SCHEDULES[name]
    values = [schedule(step / 100) for step in range(101)]
    assert (values[0], values[50]) == (1, pytest.approx(HALFWAY[name]))
    assert values[-1] == pytest.approx(1 if name == "constant" else 0)
    assert values == sorted(values, reverse=True)
