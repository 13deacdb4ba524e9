import base64
import copy
import math
import zlib

import pytest
import torch
from helpers.models import ARCHITECTURES, CLASSIC, build, variants
from helpers.page import Engine

from minigpt import ops
from minigpt.model import Linear
from minigpt.page.build import pack
from minigpt.quantize import round_weight

LIMIT = 1e-4
"""Largest difference of logits in float32."""


def ids_of(length):
    return torch.randint(0, 11, (length,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", [*variants(), *ARCHITECTURES], ids=str)
def test_logits_equal_those_of_the_model(architecture):
    gpt = build(**architecture).eval()
    ids = ids_of(gpt.config.block_size)
    logits = torch.tensor(Engine(gpt).logits(ids.tolist()))
    assert (logits - gpt(ids[None])[0]).abs().max() <= LIMIT


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("window", [0, 1, 5, 16])
def test_logits_past_the_context_equal_those_of_the_model(window, taps):
    gpt = build(attention_window=window, mlp_conv=taps).eval()
    ids = ids_of(100)
    cache = gpt.make_cache(1, gpt.config.block_size + (window or gpt.config.block_size))
    expected = torch.cat([gpt(id_[None, None], cache)[0] for id_ in ids])
    assert (torch.tensor(Engine(gpt).logits(ids.tolist())) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("architecture", [{}, {"attention_window": 5}, {"mlp_conv": 4}, CLASSIC], ids=str)
def test_a_truncated_cache_continues_as_a_new_one(architecture):
    engine = Engine(build(**architecture).eval())
    first, second = ids_of(12).tolist(), [3, 1, 4]
    truncated = engine.run(
        "const cache = gpt.makeCache(); for (const id of first) gpt.forward(id, cache);"
        "return [cache.truncate(7), ...second.map((id) => gpt.forward(id, cache))]",
        first=first, second=second,
    )  # fmt: skip
    assert truncated == [True, *engine.logits(first[:7] + second)[7:]]


def test_a_cache_is_not_truncated_to_characters_that_it_dropped():
    engine = Engine(build(attention_window=5).eval())
    code = """
        const cache = gpt.makeCache(); for (const id of ids) gpt.forward(id, cache);
        return [cache.truncate(50), cache.length, cache.truncate(99), cache.length, cache.truncate(100)]"""
    assert engine.run(code, ids=ids_of(100).tolist()) == [False, 100, True, 99, False]


def test_a_cleared_cache_holds_no_trace_of_the_last_sequence():
    engine, ids = Engine(build().eval()), ids_of(9).tolist()
    code = """
        const cache = gpt.makeCache(); gpt.forward(7, cache); cache.clear();
        return ids.map((id) => gpt.forward(id, cache))"""
    assert engine.run(code, ids=ids) == engine.logits(ids)


def probed(gpt, ids):
    """Return attention weights (layer, H, T), logit lens (layer, V) and units (layer, hidden) at the last of ids."""
    seen = {"queries": [], "streams": [], "units": []}
    for block in gpt.blocks:
        block.register_forward_hook(lambda _, __, x: seen["streams"].append(x[0, -1]))
        block.feed_forward.down.register_forward_pre_hook(lambda _, x: seen["units"].append(x[0][0, -1]))
    with pytest.MonkeyPatch.context() as patch:

        def attention(q, k, v, mask, *, window, dropout):
            seen["queries"].append((q @ k.mT / math.sqrt(q.size(-1)) + ops.causal_mask(q.size(-2), window)).softmax(-1))
            return ops.plain_attention(q, k, v, window)

        patch.setattr(ops, "causal_attention", attention)
        gpt(ids[None])
    attention = torch.stack([weights[0, :, -1] for weights in seen["queries"]])
    return attention, gpt.head(gpt.norm(torch.stack(seen["streams"]))), torch.stack(seen["units"])


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_probe_has_attention_logit_lens_and_units(architecture):
    gpt = build(**architecture).eval()
    ids = ids_of(12)
    found = Engine(gpt).run(
        "const cache = gpt.makeCache(), probe = {};"
        "for (const id of ids) gpt.forward(id, cache, probe); return probe", ids=ids.tolist(),
    )  # fmt: skip
    for name, expected in zip(("attention", "lens", "units"), probed(gpt, ids), strict=True):
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_narrow_weights_predict_what_rounded_weights_predict(dtype, architecture):
    gpt = build(**architecture).eval()
    rounded, ids = copy.deepcopy(gpt), ids_of(16)
    for name, module in rounded.named_modules():
        if isinstance(module, Linear) and not (name == "head" and gpt.config.tied_head):
            module.weight.data = round_weight(module.weight.data, dtype)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()
    logits = torch.tensor(Engine(gpt, dtype).logits(ids.tolist()))
    assert (logits - rounded(ids[None])[0]).abs().max() <= LIMIT
    assert (logits - gpt(ids[None])[0]).abs().max() > 0


def test_error_names_an_unknown_activation():
    gpt, engine = build(), Engine()
    tensors, packed = pack(gpt, "float32")
    config = gpt.config.model_dump() | {"activation": "mish"}
    with pytest.raises(Exception, match="the activation mish is not implemented in this page"):
        engine.load({"config": config, **tensors}, packed)


@pytest.mark.parametrize("name", ["embedding.weight", "conv", "blocks.1.attention.out.weight", "head.weight"])
def test_error_names_a_missing_tensor(name):
    gpt, engine = build(), Engine()
    tensors, packed = pack(gpt, "float32")
    del tensors["tensors"][name]
    with pytest.raises(Exception, match=f"the tensor {name} is missing"):
        engine.load({"config": gpt.config.model_dump(), **tensors}, packed)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:100] + b"\0" + b[101:], lambda b: b[4:8] + b[:4] + b[8:], lambda b: b""]
)
def test_damaged_weights_are_reported(damage):
    gpt, engine = build(), Engine()
    tensors, packed = pack(gpt, "float32")
    with pytest.raises(Exception, match="damaged or incomplete"):
        engine.load({"config": gpt.config.model_dump(), **tensors}, damage(packed))


@pytest.mark.parametrize("identity", [-1, 11, 0.5, None])
def test_unknown_id_is_rejected(identity):
    with pytest.raises(Exception, match="no character has the id"):
        Engine(build().eval()).logits([identity])


def test_learned_positions_end_with_the_context():
    with pytest.raises(Exception, match="context of 16 characters is full"):
        Engine(build(**CLASSIC).eval()).logits([1] * 17)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 255, 256])
def test_base64_is_decoded(length):
    content = bytes(range(256))[:length]
    code = "return [decodeBase64(text), adler32(decodeBase64(text))]"
    assert Engine().run(code, text=base64.b64encode(content).decode()) == [list(content), zlib.adler32(content)]


def test_checksum_of_many_large_bytes_does_not_overflow():
    code = "return adler32(new Uint8Array(size).fill(255))"
    assert Engine().run(code, size=1_000_003) == zlib.adler32(b"\xff" * 1_000_003)
