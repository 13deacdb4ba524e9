import platform
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers.models import ARCHITECTURES, build, variants

from minigpt import choices
from minigpt.errors import UserError
from minigpt.generation import compiler, native
from minigpt.generation.native import NativeGPT, compile_model
from minigpt.model import GPT
from minigpt.quantize import rounded_copy
from minigpt.runtime import cpu

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(params=["single products", "products of pairs", pytest.param("x86-64", marks=pytest.mark.slow)])
def processor(request, monkeypatch):
    """Target of the compilation; plain x86-64 has no vectors of 64 bytes."""
    if shutil.which("g++") is None or (request.param == "x86-64" and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"needs g++ for {request.param}")
    if request.param == "products of pairs" and "avx512_bf16" not in cpu.cpu_info("flags").split():
        pytest.skip("this processor does not multiply pairs of bfloat16 numbers")
    monkeypatch.setattr(compiler, "bfloat16_at_half_rate", lambda: request.param == "single products")
    if request.param == "x86-64":
        monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-march=x86-64"))


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "architecture", [v for v in variants() if v.get("activation", "relu") in native.ACTIVATIONS], ids=str
)
def test_compiled_logits_equal_those_of_the_model(architecture):
    gpt = build(**architecture).double().eval()
    T = gpt.config.block_size
    decoder, ids = compile_model(gpt, "float32", "always"), torch.randint(0, 11, (3, T))
    for lengths in ([1] * T, [T], [5, 1, 1, T - 7], [2, 3, T - 5]):
        cache = decoder.make_cache(3)
        logits = torch.cat([decoder(piece, cache) for piece in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(logits, gpt(ids), rtol=1e-12, atol=1e-12)


@NEEDS_COMPILER
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_cleared_cache_holds_no_trace_of_the_last_sequence(architecture):
    gpt = build(**architecture).double().eval()
    decoder = compile_model(gpt, "float32", "always")
    ids, others = torch.randint(0, 11, (2, 2, 16))
    cache = decoder.make_cache(2)
    decoder(others[:, :7], cache)
    cache.clear()
    torch.testing.assert_close(decoder(ids, cache, 10), gpt(ids)[:, 6:], rtol=1e-12, atol=1e-12)


@NEEDS_COMPILER
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-11), ("bfloat16", 0.05)])
def test_a_sequence_may_outgrow_its_cache(window, length, dtype, bound):
    gpt = build(attention_window=window).to(torch.float64 if dtype == "float32" else torch.float32).eval()
    ids = torch.randint(0, 11, (2, 96))
    longer = GPT(gpt.config.model_copy(update={"block_size": 96, "attention_window": window or 16}), 11)
    longer = longer.to(gpt.embedding.weight.dtype).eval()
    longer.load_state_dict(gpt.state_dict())
    decoder = compile_model(gpt, dtype, "always")
    cache = decoder.make_cache(2, 16 + (window or 16))
    logits = torch.cat([decoder(piece, cache) for piece in ids.split(length, 1)], 1)
    exact = rounded_copy(longer, dtype)(ids)
    assert (logits - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.usefixtures("processor")
def test_compiled_quantized_weights_predict_what_the_rounded_copy_predicts(dtype, architecture):
    gpt = build(**architecture).eval()
    ids = torch.randint(0, 11, (3, gpt.config.block_size))
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    decoder = compile_model(gpt, dtype, "always")
    logits, exact = decoder(ids, decoder.make_cache(3)), rounded_copy(gpt, dtype)(ids)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.usefixtures("processor")
def test_compiled_logits_are_bitwise_the_same_in_any_batch(dtype, architecture):
    gpt = build(**architecture).eval()
    T = gpt.config.block_size
    ids, decoder = torch.randint(0, 11, (16, T)), compile_model(gpt, dtype, "always")
    together = decoder(ids, decoder.make_cache(16))
    for rows in (slice(0, 1), slice(4, 7), slice(15, 16), slice(0, 16)):
        pieces = ids[rows].split([1, 1, 5, 2, T - 9], 1)
        cache = decoder.make_cache(len(pieces[0]))
        alone = torch.cat([decoder(piece, cache) for piece in pieces], 1)
        assert torch.equal(alone, together[rows])


def test_never_uses_pytorch_even_for_long_texts():
    assert compile_model(build().eval(), "int8", "never", 10**9) is None


@NEEDS_COMPILER
def test_auto_compiles_long_texts_first_and_later_uses_the_file_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-O0"))  # compiles in a third of the time
    gpt = build().eval()
    assert type(compile_model(gpt, "int8", "auto", native.PAYS_FROM)) is NativeGPT
    assert type(compile_model(gpt, "int8", "auto")) is NativeGPT


@pytest.mark.slow
@NEEDS_COMPILER
def test_auto_compiles_in_the_background_for_the_next_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpt = build().eval()
    assert compile_model(gpt, "int8", "auto") is None
    deadline = time.monotonic() + 300
    while not compiler.is_intact(compiler.library_path()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert type(compile_model(gpt, "int8", "auto")) is NativeGPT


@pytest.mark.slow
@NEEDS_COMPILER
def test_processes_that_compile_at_the_same_time_share_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from minigpt.generation.compiler import build_library; print(build_library())"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in started} == {str(compiler.library_path())}
    assert list(tmp_path.rglob("*.so")) == [compiler.library_path()]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no-compiler", "there is no C++ compiler no-compiler; with one (for example `apt install g++`)"),
        ("false", "false fails: no message"),
    ],
)
def test_without_a_compiler_pytorch_is_used_and_the_reason_is_said_once(tmp_path, monkeypatch, capsys, name, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", name)
    native._report_once.cache_clear()
    gpt = build().eval()
    with pytest.raises(UserError, match=r"^sample\.compile: no compiled decoder: .*; set it to auto or never$"):
        compile_model(gpt, "int8", "always")
    for _ in range(2):
        assert compile_model(gpt, "int8", "auto", native.PAYS_FROM) is None
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_an_activation_that_the_compiled_decoder_lacks_is_left_to_pytorch(monkeypatch, capsys):
    monkeypatch.setitem(choices.ACTIVATIONS, "mine", choices.Activation("torch.nn.functional.mish"))
    native._report_once.cache_clear()
    gpt = GPT(build().config.model_copy(update={"activation": "mine"}), 11).eval()
    assert compile_model(gpt, "int8", "auto", 10**9) is None
    assert "does not implement model.activation = mine" in capsys.readouterr().err
    with pytest.raises(UserError, match="mine"):
        compile_model(gpt, "int8", "always")
