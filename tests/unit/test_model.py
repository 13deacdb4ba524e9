import itertools
import math

import pytest
import torch
from helpers.models import build, variants
from helpers.workspace import ROOT, params_with

from minigpt import ops
from minigpt.choices import ACTIVATIONS
from minigpt.model import GPT, rotary_angles, weight_shapes
from minigpt.profiles import load_profile


@pytest.mark.parametrize("model", variants(), ids=str)
def test_later_characters_change_no_earlier_logit(model):
    gpt = build(**model).eval()
    T = gpt.config.block_size
    ids = torch.randint(11, (2, T))
    before = gpt(ids)
    for t in (1, T // 2, T - 1):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 11
        after = gpt(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("model", variants(), ids=str)
def test_logits_with_a_cache_equal_those_of_the_whole_sequence(model):
    gpt = build(**model).double().eval()
    T = gpt.config.block_size
    ids = torch.randint(11, (3, T))
    with torch.no_grad():
        for lengths in ([1] * T, [T], [5, 1, 1, T - 7], [2, 3, T - 5]):
            cache = gpt.make_cache(3)
            logits = torch.cat([gpt(piece, cache) for piece in ids.split(lengths, 1)], 1)
            torch.testing.assert_close(logits, gpt(ids), rtol=1e-12, atol=1e-12)


def test_rotary_angles_turn_each_pair_of_channels_counterclockwise():
    """The rotation of Su et al. (2021), as a product of complex numbers."""
    config = params_with(model={"head_size": 8}).model
    speeds = torch.tensor([config.rotary_base ** -(i / 4) for i in range(4)], dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.exp(1j * torch.arange(3)[:, None] * speeds)
    rotated = ops.rotate(x, *(angles.double() for angles in rotary_angles(config, 3)))
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), 1), rtol=1e-6, atol=1e-6)


def test_num_logits_selects_the_last_positions():
    gpt = build().double().eval()
    ids = torch.randint(11, (2, 9))
    assert torch.equal(gpt(ids, num_logits=2), gpt(ids)[:, -2:])
    torch.testing.assert_close(gpt(ids, gpt.make_cache(2), 1), gpt(ids)[:, -1:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_cleared_cache_holds_no_trace_of_the_last_sequence():
    gpt = build().double().eval()
    ids, others = torch.randint(11, (2, 2, 16))
    cache = gpt.make_cache(2)
    gpt(others[:, :7], cache)
    cache.clear()
    torch.testing.assert_close(gpt(ids, cache), gpt(ids), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("length", [1, 3, 16])
def test_a_sequence_may_outgrow_its_cache(window, length):
    gpt, ids = build(attention_window=window).double().eval(), torch.randint(11, (2, 96))
    longer = GPT(gpt.config.model_copy(update={"block_size": 96, "attention_window": window or 16}), 11).double().eval()
    longer.load_state_dict(gpt.state_dict())
    cache = gpt.make_cache(2, 16 + (window or 16))
    logits = torch.cat([gpt(piece, cache) for piece in ids.split(length, 1)], 1)
    torch.testing.assert_close(logits, longer(ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout_kind", ["element", "channel"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(dropout_kind):
    torch.manual_seed(0)
    gpt = build(dropout=0.4, dropout_kind=dropout_kind)
    drop = gpt.blocks[0].dropout
    dropped = drop(torch.ones(4000, 3, 5))
    assert abs(dropped.mean().item() - 1) < 0.03
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    if dropout_kind == "channel":
        assert torch.equal(dropped[:, 0], dropped[:, 2])
    ids = torch.randint(11, (2, 16))
    assert not torch.equal(gpt(ids), gpt(ids))
    gpt.eval()
    assert torch.equal(gpt(ids), gpt(ids))


def test_zero_init_makes_all_characters_equally_likely():
    torch.manual_seed(0)
    gpt = GPT(params_with(model={"init": "zero"}).model, vocab_size=11)
    logits = gpt(torch.randint(11, (2, 16)))
    assert logits.abs().max() == 0
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 11), torch.zeros(32, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(11))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_finite_differences(activation):
    gpt = build(n_layer=1, n_embd=6, head_size=4, block_size=4, activation=activation).double().eval()
    ids = torch.randint(11, (2, 4))
    names, values = zip(*gpt.named_parameters(), strict=True)

    def loss(*weights):
        return torch.func.functional_call(gpt, dict(zip(names, weights, strict=True)), (ids,)).square().mean()

    assert torch.autograd.gradcheck(loss, values, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("n_embd", [1, 20, 33, 512])
def test_any_width_works_with_any_number_of_heads(n_embd):
    gpt = GPT(params_with(model={"n_embd": n_embd, "n_head": 3}).model, 11)
    assert gpt(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 11)


def test_reference_has_the_published_number_of_parameters():
    # Embeddings, six blocks with their norms and biases, final norm, head: counted by hand for 65 characters.
    C, V, T = 384, 65, 256
    block = 2 * 2 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * 4 * C + (4 * C + 1) * C
    with torch.device("meta"):
        gpt = GPT(load_profile("reference", ROOT).model, V)
    assert gpt.num_parameters() == V * C + T * C + 6 * block + 2 * C + (C + 1) * V


def test_flops_per_character_equal_torchs_count():
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts all T x T products, although the causal mask hides half of them.
    for changes in ({}, {"positions": "learned", "tied_head": True, "bias": True}):
        gpt = build(n_embd=24, block_size=32, **changes)
        with FlopCounterMode(display=False) as counter:
            gpt(torch.randint(11, (2, 32))).sum().backward()
        # The gradient of the loss with respect to the embeddings needs no product.
        assert counter.get_total_flops() == 2 * 32 * gpt.flops_per_character()


@pytest.mark.slow  # transformers takes seconds to import
def test_logits_equal_hugging_face_gpt2_with_the_same_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = load_profile("reference", ROOT).model
    C, V, T = config.n_embd, 65, config.block_size
    torch.manual_seed(0)
    shape = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": config.n_layer, "n_head": config.n_head}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, **no_dropout, n_inner=4 * C, activation_function="relu", tie_word_embeddings=False)
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms count only when they are not 0 and 1
            p.add_(torch.randn_like(p) * 0.05)
    source = {name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()}
    names = {"wte.weight": "embedding.weight", "wpe.weight": "position.weight", "lm_head.weight": "head.weight"}
    names |= {"ln_f.weight": "norm.weight", "ln_f.bias": "norm.bias"}
    parts = {"ln_1": "norm1", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out"}
    parts |= {"ln_2": "norm2", "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}
    for layer, (their, our), kind in itertools.product(range(config.n_layer), parts.items(), ("weight", "bias")):
        names[f"h.{layer}.{their}.{kind}"] = f"blocks.{layer}.{our}.{kind}"
    # Their Conv1D multiplies from the other side.
    weights = {
        our: source[their].T if ".c_" in their and "weight" in their else source[their] for their, our in names.items()
    }
    ours = GPT(config, V).double().eval()
    ours.load_state_dict(weights | {"head.bias": torch.zeros(V)})
    ids = torch.randint(V, (3, T))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", variants(), ids=str)
def test_weight_shapes_are_those_of_the_model(model):
    gpt = build(**model)
    assert weight_shapes(gpt.config, 11) == {name: tuple(value.shape) for name, value in gpt.named_parameters()}
