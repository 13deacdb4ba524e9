import pytest
import torch
from conftest import params_with
from test_model import build, variants

from minigpt.decoder import Decoder, Step, choose_weights, packed, round_to_int8, rounded
from minigpt.model import GPT, Linear

CLASSIC = {
    "positions": "learned", "embd_conv": 1, "embd_norm": False, "qk_norm": False, "norm_affine": True, "bias": True,
    "activation": "relu", "init": "normal",
}  # fmt: skip
ARCHITECTURES = [{}, CLASSIC, {"attention_window": 5, "tied_head": True}, {"activation": "gelu", "mlp_ratio": 2.5}]


def model(**changes):
    torch.manual_seed(0)
    gpt = GPT(params_with(model=changes).model, 11)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt.eval()


@pytest.mark.parametrize("architecture", variants(), ids=str)
def test_reading_piece_by_piece_gives_the_logits_of_a_full_forward_pass(architecture):
    gpt = build(**architecture).double().eval()
    T = gpt.config.block_size
    decoder, ids = Decoder(gpt), torch.randint(0, 11, (3, T))
    for cuts in ([1] * T, [T], [5, 1, 1, T - 7], [2, 3, T - 5]):
        cache = decoder.cache(3)
        logits = torch.cat([decoder.read(piece, cache, piece.size(1)) for piece in ids.split(cuts, 1)], 1)
        torch.testing.assert_close(logits, gpt(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_unread_leaves_no_trace(architecture):
    gpt = model(**architecture).double()
    decoder, ids, others = Decoder(gpt), torch.randint(0, 11, (2, 16)), torch.randint(0, 11, (2, 16))
    cache = decoder.cache(2)
    decoder.read(ids[:, :6], cache)
    decoder.read(others[:, :7], cache)
    cache.unread(7)
    torch.testing.assert_close(decoder.read(ids[:, 6:], cache, 10), gpt(ids)[:, 6:], rtol=1e-12, atol=1e-12)
    cache.clear()
    torch.testing.assert_close(decoder.read(others, cache, 16), gpt(others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("piece", [1, 3, 16])
def test_a_sequence_may_outgrow_its_slots(window, piece):
    gpt, ids = model(attention_window=window).double(), torch.randint(0, 11, (2, 96))
    longer = GPT(gpt.config.model_copy(update={"block_size": 96, "attention_window": window or 16}), 11).double()
    longer.load_state_dict(gpt.state_dict())
    decoder = Decoder(gpt)
    cache = decoder.cache(2, 16 + decoder.window)
    logits = torch.cat([decoder.read(part, cache, part.size(1)) for part in ids.split(piece, 1)], 1)
    torch.testing.assert_close(logits, longer.eval()(ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(60, 20), (7, 64), (65, 384), (33, 31)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_maps_of_any_size_multiply_by_the_rounded_weights(weights, shape, bias):
    torch.manual_seed(1)
    linear = Linear(shape[1], shape[0], bias=bias)
    holder = GPT(params_with().model, 11)
    holder.head = linear
    same = rounded(holder, weights).head
    for rows in (1, 3, 16):
        x = torch.randn(rows, shape[1]).bfloat16()
        y = packed(linear, weights)(x).double()
        exact = torch.nn.functional.linear(x.double(), same.weight.double(), linear.bias.double() if bias else None)
        assert y.shape == exact.shape
        assert (y - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_int8_is_off_by_half_a_unit_at_most():
    weight = torch.randn(50, 40) * torch.logspace(-6, 3, 50)[:, None]
    weight[3] = 0
    integers, units = round_to_int8(weight)
    error = (integers * units.float()[:, None] - weight).abs()
    assert (error <= 0.5001 * units.float()[:, None] + weight.abs() * 2**-8).all()
    assert integers.abs().max() == 127
    assert not integers[3].any()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_weights_predict_what_their_model_predicts(weights, architecture):
    gpt, ids = model(**architecture), torch.randint(0, 11, (3, 16))
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    decoder, same = Decoder(gpt, weights), rounded(gpt, weights)
    logits, exact = decoder.read(ids, decoder.cache(3), 16), same(ids)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(same.blocks[0].attention.qkv.weight, gpt.blocks[0].attention.qkv.weight)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


def test_the_weights_that_are_chosen():
    cpu = torch.device("cpu")
    assert choose_weights("auto", cpu) in ("bfloat16", "float32")
    assert choose_weights("int8", cpu) == "int8"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_from_tensors_alone_gives_the_same_logits(architecture):
    gpt = model(**architecture).double()
    decoder, ids = Decoder(gpt), torch.randint(0, 11, (2, 40))
    slots = 16 + decoder.window if architecture.get("positions") != "learned" else 16
    one, other = decoder.cache(2, slots), decoder.cache(2, slots)
    step = Step(decoder, other)
    for cache in (one, other):
        decoder.read(ids[:, :3], cache)
    for number in range(3, 40 if slots > 16 else 16):
        ids_now = ids[:, number : number + 1]
        expected = decoder.read(ids_now, one)
        other.make_room(1)
        step.load(ids_now, other.place(1, decoder.turn(other.length, 1)))
        with torch.inference_mode():
            logits = step.compute()
        other.length += 1
        other.used += 1
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_on_a_gpu_through_a_graph_gives_what_the_model_predicts(architecture, weights):
    gpt, ids = model(block_size=64, **architecture).cuda(), torch.randint(0, 11, (3, 64)).cuda()
    decoder, same = Decoder(gpt, weights), rounded(gpt, weights)
    cache = decoder.cache(3)
    logits = torch.cat([decoder.read(one, cache).clone() for one in ids.split(1, 1)], 1)
    exact = same(ids)
    assert cache.step is not None
    assert (logits - exact).abs().max() < (0.001 if weights == "float32" else 0.05) * exact.abs().max()
