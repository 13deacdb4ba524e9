import math

import numpy as np
import pytest
import torch
from conftest import params_with

from minigpt.errors import UserError
from minigpt.generator import Decoding, Generator, choose, filter_probabilities, uniforms
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

CHARACTERS = "\nabcdefghij"


def generator(**model):
    torch.manual_seed(0)
    gpt = GPT(params_with(model=model).model, len(CHARACTERS))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Generator(gpt.double().eval(), Tokenizer(CHARACTERS))


@torch.no_grad()
def plainly(gen, prompt, length, decoding, sample=0):
    """What :meth:`Generator.generate` promises, without its cache: a full forward pass for every character."""
    context = gen.model.config.block_size
    ids = gen.tokenizer.encode(prompt).tolist()
    draws = uniforms(decoding.seed, sample + 1, length)[sample]
    seen = len(ids[-context:])
    for draw in draws:
        if seen > context:
            seen = context if decoding.overflow == "slide" else context // 2
        logits = gen.model(torch.tensor([ids[-seen:]]))[:, -1]
        ids.append(int(choose(logits, decoding, torch.tensor([draw]))[0]))
        seen += 1
    return gen.tokenizer.decode(ids)


@pytest.mark.parametrize("positions, embd_conv", [("learned", 1), ("rotary", 4)])
@pytest.mark.parametrize("overflow", ["hop", "slide"])
@pytest.mark.parametrize("prompt", ["a", "abcdefghijabcde", "abcdefghijabcdef", "abcdefghij" * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_what_full_forward_passes_give_past_the_context_too(
    positions, embd_conv, overflow, prompt, temperature
):
    gen = generator(positions=positions, embd_conv=embd_conv)
    decoding = Decoding(temperature=temperature, top_k=7, top_p=0.9, seed=3, overflow=overflow)
    assert gen.generate(prompt, 50, decoding) == [plainly(gen, prompt, 50, decoding)]


def test_a_sample_is_the_same_whatever_is_written_beside_it():
    gen, decoding = generator(), Decoding(seed=5)
    together = gen.generate("ab", 60, decoding, samples=4)
    assert together == [plainly(gen, "ab", 60, decoding, sample) for sample in range(4)]
    assert len(set(together)) == 4
    assert gen.generate("ab", 60, Decoding(seed=6)) != together[:1]


def test_streaming_gives_the_same_characters():
    gen, decoding = generator(), Decoding(seed=5)
    assert "ab" + "".join(c for (c,) in gen.stream("ab", 60, decoding)) == gen.generate("ab", 60, decoding)[0]


def test_nothing_to_write_gives_the_prompt():
    assert generator().generate("ab", 0, Decoding(), samples=2) == ["ab", "ab"]


@pytest.mark.parametrize("prompt, message", [("", "empty"), ("ax", "character 2, 'x'")])
def test_bad_prompts(prompt, message):
    with pytest.raises(UserError, match=message):
        generator().generate(prompt, 5, Decoding())


def test_filters_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64))
    kept = lambda **how: filter_probabilities(logits, Decoding(**how))[0].tolist()  # noqa: E731
    assert kept() == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert kept(top_k=2) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.6) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.71) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(top_p=0.01) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=3, top_p=0.99) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(temperature=0.5) == pytest.approx((np.array([16, 1, 9, 4]) / 30).tolist())


def test_draws_have_the_models_distribution():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    n = 40_000
    draws = torch.from_numpy(uniforms(0, 1, n)[0])
    ids = choose(probabilities.log().expand(n, 4), Decoding(), draws)
    share = torch.bincount(ids, minlength=4) / n
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((share - probabilities).abs() < 4 * error).all()


def test_uniforms_stay_below_one_and_do_not_depend_on_their_company():
    few, many = uniforms(7, 2, 1000), uniforms(7, 5, 1000)
    assert np.array_equal(few, many[:2])
    assert few.min() >= 0
    assert few.max() < 1
    assert abs(few.mean() - 0.5) < 4 / math.sqrt(12 * 2000)
