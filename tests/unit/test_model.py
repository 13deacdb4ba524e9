import itertools
import math

import pytest
import torch
from helpers.models import build, variants
from helpers.workspace import ROOT, params_with

from minigpt.model import GPT
from minigpt.ops import local_mask
from minigpt.params import load


@pytest.mark.parametrize("model", variants(), ids=str)
def test_a_later_character_changes_no_earlier_logit_bitwise(model):
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


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_both_ways_to_attend_agree(positions, monkeypatch):
    gpt = build(positions=positions).double().eval()
    ids = torch.randint(11, (3, 16))
    by_hand = gpt(ids)
    for block in gpt.blocks:
        monkeypatch.setattr(
            block.attention,
            "_attend",
            lambda q, k, v, mask: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
    torch.testing.assert_close(gpt(ids), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 7, 15])
@pytest.mark.parametrize("length", [16, 13, 300])
def test_attention_in_chunks_is_attention_under_a_mask(window, length):
    attention = build(attention_window=window, block_size=300).double().blocks[0].attention
    q, k, v = torch.randn(3, 2, 2, length, 8, dtype=torch.float64)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.zeros(length, length, dtype=torch.float64)
    mask[(distance < 0) | (distance >= window)] = -math.inf
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    for sequences in (1, 4):  # the fused kernel, the products
        got = attention._attend_locally(q, k, v, local_mask(window, length, sequences, q))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


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


def test_at_first_all_characters_are_equally_likely():
    torch.manual_seed(0)
    gpt = GPT(params_with(model={"init": "zero"}).model, vocab_size=11)
    logits = gpt(torch.randint(11, (2, 16)))
    assert logits.abs().max() == 0
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 11), torch.zeros(32, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(11))


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "swiglu"])
def test_gradients_are_those_of_finite_differences(activation):
    gpt = build(n_layer=1, n_embd=6, head_size=4, block_size=4, activation=activation).double().eval()
    ids = torch.randint(11, (2, 4))
    names, values = zip(*gpt.named_parameters(), strict=True)

    def loss(*weights):
        return torch.func.functional_call(gpt, dict(zip(names, weights, strict=True)), (ids,)).square().mean()

    assert torch.autograd.gradcheck(loss, values, atol=1e-6)


@pytest.mark.parametrize("n_embd", [1, 20, 33, 512])
def test_any_width_works_with_any_number_of_heads(n_embd):
    gpt = GPT(params_with(model={"n_embd": n_embd, "n_head": 3}).model, 11)
    assert gpt(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 11)


def test_reference_has_the_published_number_of_parameters():
    # Embeddings, six blocks with their norms and biases, final norm, head: counted by hand for 65 characters.
    C, V, T = 384, 65, 256
    block = 2 * 2 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * 4 * C + (4 * C + 1) * C
    with torch.device("meta"):
        gpt = GPT(load(ROOT / "configs/reference.yaml").model, V)
    assert gpt.num_parameters() == V * C + T * C + 6 * block + 2 * C + (C + 1) * V


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    # As torch counts, all T x T products count, half of which the causal mask hides.
    for changes in ({}, {"positions": "learned", "tied_head": True, "bias": True}):
        gpt = build(n_embd=24, block_size=32, **changes)
        with FlopCounterMode(display=False) as counter:
            gpt(torch.randint(11, (2, 32))).sum().backward()
        # The gradient of the loss with respect to the embeddings needs no product.
        assert counter.get_total_flops() == 2 * 32 * gpt.flops_per_character()


def test_logits_equal_hugging_faces_gpt2_with_its_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = load(ROOT / "configs/reference.yaml").model
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
