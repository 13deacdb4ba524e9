import platform
import shutil

import pytest
import torch
from helpers.models import build, variants
from helpers.workspace import params_with

from minigpt.data.dataset import Split
from minigpt.errors import UserError
from minigpt.evaluation.loss import score
from minigpt.generation import native
from minigpt.generation.decoder import Decoder, Step
from minigpt.model import GPT, Linear
from minigpt.quantize import choose_weight_dtype, loss_by_weights, packed, quantize_int8, rounded
from minigpt.runtime import cpu
from minigpt.runtime.device import has_bfloat16

CLASSIC = {
    "positions": "learned", "embd_conv": 1, "embd_norm": False, "qk_norm": False, "norm_affine": True, "bias": True,
    "activation": "relu", "init": "normal",
}  # fmt: skip
ARCHITECTURES = [
    {},
    CLASSIC,
    {"attention_window": 5, "tied_head": True},
    {"activation": "gelu", "mlp_ratio": 2.5},
    {"activation": "swiglu"},
]
WIDE = {"head_size": 64, "n_embd": 67, "block_size": 40}


def model(**changes):
    torch.manual_seed(0)
    gpt = GPT(params_with(model=changes).model, 11)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt.eval()


COMPILED = pytest.param("always", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))
HOW = pytest.mark.parametrize("how", ["never", COMPILED])


@pytest.fixture(params=["one by one", "in pairs", "x86-64"])
def processor(request, monkeypatch):
    """What a compiled decoder is compiled for: also the least that such processors have, so no vectors of 64 bytes."""
    if shutil.which("g++") is None or (request.param == "x86-64" and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"needs g++ for {request.param}")
    if request.param == "in pairs" and "avx512_bf16" not in cpu.cpu_info("flags").split():
        pytest.skip("this processor does not multiply pairs of bfloat16 numbers")
    monkeypatch.setattr(native, "bfloat16_at_half_rate", lambda: request.param == "one by one")
    if request.param == "x86-64":
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-march=x86-64"))


@HOW
@pytest.mark.parametrize("architecture", variants(), ids=str)
def test_reading_piece_by_piece_gives_the_logits_of_a_full_forward_pass(architecture, how):
    gpt = build(**architecture).double().eval()
    T = gpt.config.block_size
    decoder, ids = native.decoder(gpt, "float32", how), torch.randint(0, 11, (3, T))
    for cuts in ([1] * T, [T], [5, 1, 1, T - 7], [2, 3, T - 5]):
        cache = decoder.cache(3)
        logits = torch.cat([decoder.read(piece, cache, piece.size(1)) for piece in ids.split(cuts, 1)], 1)
        torch.testing.assert_close(logits, gpt(ids), rtol=1e-12, atol=1e-12)


@HOW
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_unread_leaves_no_trace(architecture, how):
    gpt = model(**architecture).double()
    decoder = native.decoder(gpt, "float32", how)
    ids, others = torch.randint(0, 11, (2, 16)), torch.randint(0, 11, (2, 16))
    cache = decoder.cache(2)
    decoder.read(ids[:, :6], cache)
    decoder.read(others[:, :7], cache)
    cache.unread(7)
    torch.testing.assert_close(decoder.read(ids[:, 6:], cache, 10), gpt(ids)[:, 6:], rtol=1e-12, atol=1e-12)
    cache.clear()
    torch.testing.assert_close(decoder.read(others, cache, 16), gpt(others), rtol=1e-12, atol=1e-12)


@HOW
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("piece", [1, 3, 16])
@pytest.mark.parametrize("weights, bound", [("float32", 1e-11), ("bfloat16", 0.05)])
def test_a_sequence_may_outgrow_its_slots(window, piece, how, weights, bound):
    dtype = torch.float64 if weights == "float32" else torch.float32
    gpt, ids = model(attention_window=window).to(dtype), torch.randint(0, 11, (2, 96))
    longer = GPT(gpt.config.model_copy(update={"block_size": 96, "attention_window": window or 16}), 11).to(dtype)
    longer.load_state_dict(gpt.state_dict())
    decoder = native.decoder(gpt, weights, how)
    cache = decoder.cache(2, 16 + decoder.window)
    logits = torch.cat([decoder.read(part, cache, part.size(1)) for part in ids.split(piece, 1)], 1)
    exact = rounded(longer.eval(), weights)(ids)
    assert (logits - exact).abs().max() < bound * exact.abs().max()


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
    integers, units = quantize_int8(weight)
    error = (integers * units.float()[:, None] - weight).abs()
    assert (error <= 0.5001 * units.float()[:, None] + weight.abs() * 2**-8).all()
    assert integers.abs().max() == 127
    assert not integers[3].any()


def predicts_what_the_rounded_model_predicts(gpt, weights, how):
    T = gpt.config.block_size
    ids = torch.randint(0, 11, (3, T))
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    decoder, same = native.decoder(gpt, weights, how), rounded(gpt, weights)
    logits, exact = decoder.read(ids, decoder.cache(3), T), same(ids)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(same.blocks[0].attention.qkv.weight, gpt.blocks[0].attention.qkv.weight)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WIDE])
def test_rounded_weights_predict_what_their_model_predicts(weights, architecture):
    predicts_what_the_rounded_model_predicts(model(**architecture), weights, "never")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WIDE])
@pytest.mark.usefixtures("processor")
def test_rounded_weights_predict_it_compiled(weights, architecture):
    predicts_what_the_rounded_model_predicts(model(**architecture), weights, "always")


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WIDE])
@pytest.mark.usefixtures("processor")
def test_compiled_the_logits_of_a_sequence_are_bitwise_the_same_in_any_company(weights, architecture):
    gpt = model(**architecture)
    T = gpt.config.block_size
    ids, decoder = torch.randint(0, 11, (16, T)), native.decoder(gpt, weights, "always")
    together = decoder.read(ids, decoder.cache(16), T)
    for rows in (slice(0, 1), slice(4, 7), slice(15, 16), slice(0, 16)):
        pieces = ids[rows].split([1, 1, 5, 2, T - 9], 1)
        cache = decoder.cache(len(pieces[0]))
        apart = torch.cat([decoder.read(piece, cache, piece.size(1)) for piece in pieces], 1)
        assert torch.equal(apart, together[rows])


def test_compiling_is_chosen_by_length():
    gpt = model()
    assert type(native.decoder(gpt, "int8", "auto", native.PAYS_FROM - 1)) is Decoder
    assert type(native.decoder(gpt, "int8", "never", 10**9)) is Decoder
    if shutil.which("g++"):
        assert type(native.decoder(gpt, "int8", "auto", native.PAYS_FROM)) is native.NativeDecoder
        assert type(native.decoder(gpt, "int8", "kept")) is native.NativeDecoder


@pytest.mark.parametrize(
    "compiler, message", [("no-compiler", "there is no C++ compiler no-compiler"), ("false", "false fails: without a")]
)
def test_where_nothing_compiles_it_is_told(tmp_path, monkeypatch, capsys, compiler, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(UserError, match=r"^sample\.compile: no compiled decoder: .*; set it to auto or never$"):
        native.decoder(model(), "int8", "always")
    assert type(native.decoder(model(), "int8", "kept")) is Decoder
    assert not capsys.readouterr().err
    assert type(native.decoder(model(), "int8", "auto", native.PAYS_FROM)) is Decoder
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_the_loss_by_weights_is_that_of_the_rounded_models():
    gpt = model()
    split = Split(torch.randint(0, 11, (200,), dtype=torch.uint8))
    losses = loss_by_weights(gpt, lambda variant: score(variant, split).loss)
    assert losses["float32"] == score(gpt, split).loss
    assert list(losses) == ["float32", "bfloat16", "int8"]
    same = rounded(gpt, "int8")
    same.compute_dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else None
    assert losses["int8"] == score(same, split).loss
    assert len(set(losses.values())) == 3


def test_the_weights_that_are_chosen():
    cpu = torch.device("cpu")
    assert choose_weight_dtype("auto", cpu) in ("bfloat16", "float32")
    assert choose_weight_dtype("int8", cpu) == "int8"


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
