import math
import shutil

import numpy as np
import pytest
import torch
from helpers.workspace import params_with
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.generation.drafts import Drafts
from minigpt.generation.generator import Generator
from minigpt.generation.sampling import SamplingParams, Stops, choose, filter_probabilities, penalize, uniforms
from minigpt.model import GPT

CHARACTERS = "\nabcdefghij"


def generator(compiled="never", **model):
    torch.manual_seed(0)
    gpt = GPT(params_with(model=model).model, len(CHARACTERS))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Generator(gpt.double().eval(), Tokenizer(CHARACTERS), compiled=compiled)


@torch.no_grad()
def plainly(gen, prompt, length, sampling, sample=0):
    """What :meth:`Generator.generate` promises, without its cache: a full forward pass for every character."""
    config = gen.model.config
    context, window = config.block_size, config.attention_window or config.block_size
    ids = gen.tokenizer.encode(prompt).tolist()
    draws = uniforms(sampling.seed, sample + 1, length)[sample]
    seen, model = len(ids[-context:]), gen.model
    if sampling.overflow == "roll":  # what a model with a context for it all computes within its window
        longer = config.model_copy(update={"block_size": len(ids) + length, "attention_window": window})
        model = GPT(longer, len(CHARACTERS)).double().eval()
        model.load_state_dict(gen.model.state_dict())
        seen = len(ids)
    for draw in draws:
        if seen > context and sampling.overflow != "roll":
            seen = context if sampling.overflow == "slide" else context // 2
        logits = model(torch.tensor([ids[-seen:]]))[:, -1]
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, torch.tensor([ids[-context:]]), sampling.repetition_penalty)
        ids.append(int(choose(logits, sampling, torch.tensor([draw]))[0]))
        seen += 1
    return gen.tokenizer.decode(ids)


COMPILED = pytest.param("always", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))
HOW = pytest.mark.parametrize("how", ["never", COMPILED])


@HOW
@pytest.mark.parametrize(
    "model",
    [
        {"positions": "learned", "embd_conv": 1},
        {"positions": "rotary", "embd_conv": 4},
        {"positions": "rotary", "embd_conv": 4, "attention_window": 5},
    ],
)
@pytest.mark.parametrize("overflow", ["reread", "slide", "roll"])
@pytest.mark.parametrize("prompt", ["a", "abcdefghijabcde", "abcdefghijabcdef", "abcdefghij" * 5])
@pytest.mark.parametrize("temperature, penalty", [(0.0, 1.0), (1.0, 1.0), (1.0, 1.5)])
def test_text_is_what_full_forward_passes_give_past_the_context_too(
    model, overflow, prompt, *, temperature, penalty, how
):
    gen = generator(how, **model)
    sampling = SamplingParams(
        temperature, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=penalty, seed=3, overflow=overflow
    )
    if overflow == "roll" and model["positions"] == "learned":
        with pytest.raises(UserError, match="rotary"):
            gen.generate(prompt, 50, sampling)
        return
    assert gen.generate(prompt, 80, sampling) == [plainly(gen, prompt, 80, sampling)]


@HOW
@pytest.mark.parametrize("model", [{"positions": "learned", "embd_conv": 1}, {}, {"attention_window": 5}])
@pytest.mark.parametrize("overflow", ["reread", "slide", "roll"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guesses_change_no_character(model, overflow, temperature, how):
    gen = generator(how, **model)
    if overflow == "roll" and model.get("positions") == "learned":
        return
    sampling = SamplingParams(temperature, seed=3, overflow=overflow, stop=("jj",))
    expected = gen.generate("abcdefgh", 150, sampling)
    own_text = gen.tokenizer.encode(expected[0] * 3)
    gen.drafts = Drafts.of(own_text, len(CHARACTERS))  # often right, and wrong where the text branches
    reads = count_reads(gen)
    assert gen.generate("abcdefgh", 150, sampling) == expected
    written = len(expected[0]) - 8
    assert max(reads) > 1
    assert len(reads) < 0.9 * written or overflow == "slide"


def count_reads(gen):
    """The lengths of what the generator's decoder reads from now on."""
    lengths, read = [], gen.decoder.read
    gen.decoder.read = lambda ids, *rest: lengths.append(ids.size(1)) or read(ids, *rest)
    return lengths


@HOW
def test_a_sample_is_the_same_whatever_is_written_beside_it(how):
    gen, sampling = generator(how), SamplingParams(seed=5)
    together = gen.generate("ab", 60, sampling, samples=4)
    assert together == [plainly(gen, "ab", 60, sampling, sample) for sample in range(4)]
    assert len(set(together)) == 4
    assert gen.generate("ab", 60, SamplingParams(seed=6)) != together[:1]


def test_streaming_gives_the_same_characters():
    gen, sampling = generator(), SamplingParams(seed=5)
    assert "ab" + "".join(c for (c,) in gen.stream("ab", 60, sampling)) == gen.generate("ab", 60, sampling)[0]


@HOW
def test_texts_that_are_written_by_turns_do_not_mix(how):
    gen, prompts = generator(how), ("ab", "hgfe")
    apart = [gen.generate(prompt, 60, SamplingParams(seed=5))[0] for prompt in prompts]
    for _ in range(2):
        by_turns = zip(*(gen.stream(prompt, 60, SamplingParams(seed=5)) for prompt in prompts), strict=True)
        written = ["".join(one for (one,) in pieces) for pieces in zip(*by_turns, strict=True)]
        assert [prompt + text for prompt, text in zip(prompts, written, strict=True)] == apart


def test_nothing_to_write_gives_the_prompt():
    assert generator().generate("ab", 0, SamplingParams(), samples=2) == ["ab", "ab"]


@pytest.mark.parametrize("prompt, message", [("", "empty"), ("ax", "character 2, 'x'")])
def test_bad_prompts(prompt, message):
    with pytest.raises(UserError, match=message):
        generator().generate(prompt, 5, SamplingParams())


def test_filters_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64))

    def kept(**how):
        probabilities = filter_probabilities(logits, SamplingParams(**how))[0]
        return (probabilities / probabilities.sum()).tolist()

    assert kept() == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert kept(top_k=2) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.6) == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert kept(top_p=0.71) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(top_p=0.01) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=3, top_p=0.99) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(min_p=0.5) == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    assert kept(min_p=1.0) == pytest.approx([1, 0, 0, 0])
    assert kept(top_k=2, min_p=0.8) == pytest.approx([1, 0, 0, 0])
    assert kept(temperature=0.5) == pytest.approx((np.array([16, 1, 9, 4]) / 30).tolist())


def test_a_penalty_makes_what_the_context_has_less_likely():
    logits = torch.tensor([[2.0, -1.0, 3.0, -4.0], [2.0, -1.0, 3.0, -4.0]])
    context = torch.tensor([[0, 0, 1], [2, 3, 2]])
    expected = [[1.0, -2.0, 3.0, -4.0], [2.0, -1.0, 1.5, -8.0]]
    assert penalize(logits, context, 2.0).tolist() == expected


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(text, stop):
    shown = Stops(stop)
    pieces = [shown.add(character) for character in text]
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:  # the stop string that is complete first; of those complete at once, the one that was named first
        ended = next(s for s in stop if text[: min(ends)].endswith(s))
        assert shown.ended
        assert "".join(pieces) == text[: min(ends) - len(ended)]
    else:
        assert not shown.ended
        assert "".join(pieces) + shown.rest() == text


def test_samples_end_each_on_its_own():
    gen, sampling = generator(), SamplingParams(seed=5)
    whole = gen.generate("ab", 60, sampling, samples=4)
    stop = whole[1][20:22]
    cut = gen.generate("ab", 60, SamplingParams(seed=5, stop=(stop,)), samples=4)
    for one, all_of_it in zip(cut, whole, strict=True):
        written = all_of_it[2:]
        assert one == "ab" + (written[: written.find(stop)] if stop in written else written)
    assert len(cut[1]) <= 20


def test_draws_have_the_models_distribution():
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    n = 40_000
    draws = torch.from_numpy(uniforms(0, 1, n)[0])
    ids = choose(probabilities.log().expand(n, 4), SamplingParams(), draws)
    share = torch.bincount(ids, minlength=4) / n
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((share - probabilities).abs() < 4 * error).all()


def test_uniforms_stay_below_one_and_do_not_depend_on_their_company():
    few, many = uniforms(7, 2, 1000), uniforms(7, 5, 1000)
    assert np.array_equal(few, many[:2])
    assert few.min() >= 0
    assert few.max() < 1
    assert abs(few.mean() - 0.5) < 4 / math.sqrt(12 * 2000)
