import itertools
import shutil

import numpy as np
import pytest
import torch
from helpers.models import build

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.generation import sampling
from minigpt.generation.generator import Generator
from minigpt.generation.sampling import draw_uniforms, penalize, sample
from minigpt.model import GPT
from minigpt.params import SamplingParams

CHARACTERS = "\nabcdefghij"
COMPILED = pytest.param("always", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))
MODES = pytest.mark.parametrize("mode", ["never", COMPILED])
LEARNED = {"positions": "learned", "embd_conv": 1}


class PlainGenerator:
    """Text by full forward passes, without a cache, as the oracle."""

    def __init__(self, model):
        self.model, self.tokenizer = model, Tokenizer(CHARACTERS)

    @torch.no_grad()
    def generate(self, prompt, sampling, number=0):
        config, length = self.model.config, sampling.max_new_tokens
        context, window = config.block_size, min(config.attention_window or 16, config.block_size)
        ids = self.tokenizer.encode(prompt).tolist()
        model, seen = self.model, len(ids[-context:])
        if sampling.overflow == "roll":  # equals a model with a longer context and the same attention window
            longer = config.model_copy(update={"block_size": len(ids) + length, "attention_window": window})
            model, seen = GPT(longer, len(CHARACTERS)).double().eval(), len(ids)
            model.load_state_dict(self.model.state_dict())
        uniforms = np.concatenate(list(draw_uniforms(sampling.seed, number + 1, length)), 1)[number]
        for uniform in uniforms:
            if seen > context and sampling.overflow != "roll":
                seen = context if sampling.overflow == "slide" else context // 2
            logits = model(torch.tensor([ids[-seen:]]))[:, -1]
            if sampling.repetition_penalty != 1:
                logits = penalize(logits, torch.tensor([ids[-context:]]), sampling.repetition_penalty)
            ids.append(int(sample(logits, sampling, torch.tensor([uniform]))[0]))
            seen += 1
        return self.tokenizer.decode(ids)


def generators(mode="never", **model):
    """Return a generator and its plain counterpart."""
    gpt = build(**model).double().eval()
    return Generator(gpt, Tokenizer(CHARACTERS), compile=mode), PlainGenerator(gpt)


def params(**changes):
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 60, "seed": 5} | changes)


CASES = [
    (model, overflow)
    for model, overflow in itertools.product(
        [LEARNED, {}, {"attention_window": 5}, {"attention_window": 40}], ["reread", "slide", "roll"]
    )
    if (model, overflow) != (LEARNED, "roll")
]


PROMPTS = [
    ("a", 1.0, 1.0), ("a", 1.0, 1.5), ("abcdefghijabcde", 0.0, 1.0), ("abcdefghijabcdef", 1.0, 1.0),
    ("abcdefghij" * 5, 1.0, 1.5),
]  # fmt: skip


# Each case with two prompts, and each prompt with three cases or more.
@pytest.mark.parametrize(
    "model, overflow, prompt, temperature, penalty",
    [(*case, *PROMPTS[(number + shift) % 5]) for number, case in enumerate(CASES) for shift in (0, 2)],
)
def test_text_equals_that_of_full_forward_passes(model, overflow, prompt, *, temperature, penalty):
    sampling = params(
        temperature=temperature, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=penalty, seed=3,
        overflow=overflow, max_new_tokens=80,
    )  # fmt: skip
    generator, plain = generators(**model)
    expected = [plain.generate(prompt, sampling)]
    assert generator.generate(prompt, sampling) == expected
    if shutil.which("g++"):
        assert generators("always", **model)[0].generate(prompt, sampling) == expected


def test_roll_is_refused_with_learned_positions():
    with pytest.raises(UserError, match="roll needs rotary positions"):
        generators(**LEARNED)[0].generate("a", params(overflow="roll"))


@MODES
def test_a_sample_does_not_depend_on_the_other_samples(mode):
    generator, plain = generators(mode)
    together = generator.generate("ab", params(), samples=4)
    assert together == [plain.generate("ab", params(), number) for number in range(4)]
    assert len(set(together)) == 4
    assert generator.generate("ab", params(seed=6)) != together[:1]


def test_streaming_gives_the_same_text():
    generator, _ = generators()
    assert "ab" + "".join(c for (c,) in generator.stream("ab", params())) == generator.generate("ab", params())[0]


@MODES
def test_interleaved_streams_do_not_mix(mode):
    generator, prompts = generators(mode)[0], ("ab", "hgfe")
    alone = [generator.generate(prompt, params())[0] for prompt in prompts]
    for _ in range(2):
        interleaved = zip(*(generator.stream(prompt, params()) for prompt in prompts), strict=True)
        written = ["".join(one for (one,) in pieces) for pieces in zip(*interleaved, strict=True)]
        assert [prompt + text for prompt, text in zip(prompts, written, strict=True)] == alone


def test_no_new_tokens_gives_the_prompt():
    assert generators()[0].generate("ab", params(max_new_tokens=0), samples=2) == ["ab", "ab"]


@pytest.mark.parametrize("prompt, message", [("", "empty"), ("ax", "character 2, 'x'")])
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(UserError, match=message):
        generators()[0].generate(prompt, params(max_new_tokens=5))


def test_each_sample_ends_at_its_own_stop_string():
    generator, _ = generators()
    whole = generator.generate("ab", params(), samples=4)
    stop = whole[1][20:22]
    cut = generator.generate("ab", params(stop=[stop]), samples=4)
    for text, full in zip(cut, whole, strict=True):
        assert text == "ab" + full[2:].partition(stop)[0]
    assert len(cut[1]) <= 20


def test_stop_string_is_normalized_as_the_text_is():
    generator = Generator(build().eval(), Tokenizer("\nabcdefgh\u00e9j", "NFC"))
    full = generator.generate("ab", params(max_new_tokens=200))[0]
    assert "\u00e9" in full
    assert generator.generate("ab", params(max_new_tokens=200, stop=["e\u0301"]))[0] == full.partition("\u00e9")[0]


@MODES
@pytest.mark.parametrize("model, overflow", CASES)
def test_text_does_not_depend_on_the_memory_reserved_in_advance(model, overflow, mode, monkeypatch):
    generator, _ = generators(mode, **model)
    for prompt, penalty in (("a", 1.5), ("abcdefghij" * 5, 1.0)):
        how = params(overflow=overflow, repetition_penalty=penalty, stop=["ab"])
        monkeypatch.undo()
        whole = generator.generate(prompt, how, samples=2)
        for chunk in (1, 7):
            monkeypatch.setattr(sampling, "CHUNK", chunk)
            assert generator.generate(prompt, how, samples=2) == whole


def test_longest_text_starts_immediately_and_takes_little_memory():
    generator, _ = generators()
    pieces = generator.stream("ab" * 100, params(max_new_tokens=10**12, overflow="roll"))
    written = "".join(piece for (piece,) in itertools.islice(pieces, 100))
    assert 0 < len(written) < 100  # the parts of the prompt come first, without text


def test_weights_that_overflow_are_an_error():
    gpt = build()
    torch.nn.init.constant_(gpt.head.weight, torch.finfo(torch.float32).max)
    with pytest.raises(UserError, match="logits that are not finite"):
        Generator(gpt.eval(), Tokenizer(CHARACTERS)).generate("ab", params())
