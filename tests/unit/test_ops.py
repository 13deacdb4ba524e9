"""Each fast function against the plain formula that it replaces."""

import pytest
import torch

from minigpt import ops


def gradients(function, *inputs):
    """Return the value of ``function`` and its gradients, with random weights on the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    torch.manual_seed(1)
    return value, *torch.autograd.grad(value, inputs, torch.randn_like(value))


def equal(function, plain, *inputs, tolerance=1e-13):
    """Compare values and gradients, and the values without gradients."""
    for found, expected in zip(gradients(function, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(function(*inputs), plain(*inputs), rtol=0, atol=tolerance)


def test_squared_relu_equals_the_plain_formula():
    torch.manual_seed(0)
    equal(ops.squared_relu, ops.plain_squared_relu, torch.randn(3, 5, 7, dtype=torch.float64))


def test_swiglu_multiplies_one_half_by_the_gate_of_the_other():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(ops.swiglu(x), x[:, :4] * torch.sigmoid(x[:, :4]) * x[:, 4:])


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (1, 1, 1, 2)])
def test_rotate_equals_the_plain_formula(shape):
    torch.manual_seed(0)
    angles = torch.rand(shape[-2], shape[-1] // 2, dtype=torch.float64) * 10
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(shape, dtype=torch.float64)
    equal(lambda x: ops.rotate(x, cos, sin), lambda x: ops.plain_rotate(x, cos, sin), x)


def test_rotate_keeps_the_norm_of_each_pair():
    angles = torch.rand(5, 4, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    rotated = ops.rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotated[..., :4].hypot(rotated[..., 4:]), x[..., :4].hypot(x[..., 4:]))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_causal_convolution_equals_the_plain_formula(length):
    torch.manual_seed(0)
    x, weights = torch.randn(2, length, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    equal(ops.causal_convolution, ops.plain_causal_convolution, x, weights)


def masks(x, window, n_head):
    """Yield the masks for the products, for the fused kernel, and for each way to attend in chunks."""
    length = x.size(1)
    yield ops.attention_mask(x, length, window, n_head)
    if 0 < window < length:
        yield ops.attention_mask(x[:1], length, window, 1)
    elif not window:
        yield None


@pytest.mark.parametrize("window", [0, 1, 3, 7, 15, 40])
@pytest.mark.parametrize("length", [16, 13, 65])
def test_causal_attention_equals_the_plain_formula(window, length):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, length, 8, dtype=torch.float64)
    for mask in masks(torch.empty(2, length, dtype=torch.float64), window, 3):
        equal(
            lambda q, k, v, mask=mask: ops.causal_attention(q, k, v, mask, window=window),
            lambda q, k, v: ops.plain_attention(q, k, v, window),
            q, k, v,
        )  # fmt: skip


def test_the_fused_kernel_is_used_for_long_contexts_on_a_cpu():
    x = torch.empty(1, 1)
    assert ops.attention_mask(x, ops.LONGEST_BY_PRODUCTS, 0, 1) is not None
    assert ops.attention_mask(x, ops.LONGEST_BY_PRODUCTS + 1, 0, 1) is None


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = torch.zeros(400, 2, 16, 8), torch.zeros(400, 2, 16, 8), torch.ones(400, 2, 16, 8)
    mask = ops.attention_mask(q, 16, 0, 2)
    y = ops.causal_attention(q, k, v, mask, dropout=0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert y.std() > 0.1
    torch.testing.assert_close(ops.causal_attention(q, k, v, mask), v)
