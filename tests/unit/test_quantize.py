import copy

import pytest
import torch
from helpers.models import ARCHITECTURES, build
from helpers.workspace import params_with

from minigpt.data.dataset import Split
from minigpt.evaluation.loss import score
from minigpt.model import GPT, Linear
from minigpt.quantize import (
    BFloat16Linear,
    Int8Linear,
    choose_weight_dtype,
    loss_by_weights,
    quantize,
    quantize_int8,
    round_weight,
    rounded_copy,
)
from minigpt.runtime.device import has_bfloat16


@pytest.mark.parametrize("dtype, kind", [("bfloat16", BFloat16Linear), ("int8", Int8Linear)])
@pytest.mark.parametrize("shape", [(60, 20), (7, 64), (65, 384), (33, 31)])
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_maps_multiply_by_the_rounded_weights(dtype, kind, shape, bias):
    torch.manual_seed(1)
    linear = Linear(shape[1], shape[0], bias=bias)
    weight = round_weight(linear.weight.detach(), dtype)
    for rows in ((1,), (3,), (2, 5)):
        x = torch.randn(*rows, shape[1]).bfloat16()
        y = kind(linear.weight.detach(), linear.bias)(x).double()
        exact = torch.nn.functional.linear(x.double(), weight.double(), linear.bias.double() if bias else None)
        assert y.shape == exact.shape
        assert (y - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_int8_error_is_at_most_half_a_scale():
    weight = torch.randn(50, 40) * torch.logspace(-6, 3, 50)[:, None]
    weight[3] = 0
    integers, scales = quantize_int8(weight)
    error = (integers * scales.float()[:, None] - weight).abs()
    assert (error <= 0.5001 * scales.float()[:, None] + weight.abs() * 2**-8).all()
    assert integers.abs().max() == 127
    assert not integers[3].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_quantized_models_predict_what_the_rounded_copy_predicts(dtype, architecture):
    gpt = build(**architecture).eval()
    before = copy.deepcopy(gpt.state_dict())
    ids = torch.randint(0, 11, (3, gpt.config.block_size))
    quantized, same = quantize(gpt, dtype), rounded_copy(gpt, dtype)
    exact = same(ids)
    for logits in (quantized(ids, quantized.make_cache(3)), quantized(ids)):
        assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(same.blocks[0].attention.qkv.weight, gpt.blocks[0].attention.qkv.weight)
    assert torch.equal(same.embedding.weight, gpt.embedding.weight)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


def test_quantizing_copies_no_tensor_that_stays_as_it_is():
    gpt = build().eval()
    quantized = quantize(gpt, "int8")
    assert quantized.embedding.weight.data_ptr() == gpt.embedding.weight.data_ptr()
    assert quantized.cos.data_ptr() == gpt.cos.data_ptr()
    assert quantize(gpt, "float32") is gpt


def test_loss_by_weights_is_the_loss_of_the_rounded_copies():
    gpt = GPT(params_with().model, 11)
    torch.manual_seed(0)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    split = Split(torch.randint(0, 11, (200,), dtype=torch.uint8))
    losses = loss_by_weights(gpt, lambda variant: score(variant, split).loss)
    assert losses["float32"] == score(gpt, split).loss
    assert list(losses) == ["float32", "bfloat16", "int8"]
    same = rounded_copy(gpt, "int8")
    same.compute_dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else None
    assert losses["int8"] == score(same, split).loss
    assert len(set(losses.values())) == 3


def test_auto_chooses_bfloat16_only_where_the_hardware_multiplies_it():
    cpu = torch.device("cpu")
    assert choose_weight_dtype("auto", cpu) == ("bfloat16" if has_bfloat16(cpu) else "float32")
    assert choose_weight_dtype("int8", cpu) == "int8"
