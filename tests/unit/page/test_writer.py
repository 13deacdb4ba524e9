import numpy as np
import pytest
import torch
from helpers.models import CLASSIC, build
from helpers.page import Engine

from minigpt.data.tokenizer import Tokenizer
from minigpt.generation.generator import Generator
from minigpt.generation.sampling import draw_uniforms, filter_probabilities, penalize, sample
from minigpt.params import SamplingParams

CHARACTERS = "\n abcdé\u2028\ud7ff\U0001f600z"
SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 1.0},
    {"top_k": 3},
    {"min_p": 0.2, "temperature": 2.5},
    {"repetition_penalty": 1.7},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 0.8, "temperature": 1.3},
]
FILTERS = [sampling for sampling in SAMPLINGS if sampling.get("temperature") != 0]


@pytest.fixture(scope="module")
def engine():
    return Engine()


@pytest.mark.parametrize("seed", [0, 1, 1337, 2**53 + 1, 2**63 - 1])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_uniforms_equal_those_of_numpy(engine, seed, number):
    code = "const next = uniforms(seed, sample); return Array.from({length: 1000}, () => next.next().value)"
    expected = np.concatenate([*draw_uniforms(seed, number + 1, 1000)], 1)[number].tolist()
    assert engine.run(code, seed=str(seed), sample=number) == expected


@pytest.mark.parametrize("sampling", [*FILTERS, {"top_k": 99}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_filtered_probabilities_equal_those_of_python(engine, sampling):
    sampling = SamplingParams(**sampling)
    logits = torch.randn(20, 65, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 7] = logits[:, 3]  # equal logits at the limits of top-k and top-p
    code = "return rows.map((row) => filterProbabilities(Float32Array.from(row), sampling))"
    found = torch.tensor(engine.run(code, rows=logits.tolist(), sampling=sampling.model_dump()), dtype=torch.float64)
    expected = filter_probabilities(logits, sampling)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 3.0])
def test_penalized_logits_equal_those_of_python(engine, penalty):
    logits = torch.randn(1, 65, generator=torch.Generator().manual_seed(0)) * 4
    context = torch.tensor([[1, 5, 5, 64, 0]])
    code = "return penalize(Float32Array.from(logits), context, penalty)"
    found = engine.run(code, logits=logits[0].tolist(), context=context[0].tolist(), penalty=penalty)
    assert found == penalize(logits, context, penalty)[0].tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_choice_equals_that_of_python(engine, sampling):
    sampling = SamplingParams(**sampling)
    logits = torch.randn(200, 65, generator=torch.Generator().manual_seed(1)) * 3
    uniforms = torch.from_numpy(np.concatenate([*draw_uniforms(3, 1, 200)], 1)[0])
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    code = "return rows.map((row, i) => choose(Float32Array.from(row), sampling, uniforms[i]))"
    found = engine.run(code, rows=logits.tolist(), sampling=sampling.model_dump(), uniforms=uniforms.tolist())
    assert found == sample(logits, sampling, uniforms).tolist()


@pytest.mark.parametrize(
    "architecture, overflow",
    [
        ({}, "reread"), ({}, "slide"), ({}, "roll"), ({"attention_window": 5}, "roll"),
        ({"attention_window": 40}, "roll"),
        ({"attention_window": 5}, "reread"), (CLASSIC, "reread"), (CLASSIC, "slide"), ({"block_size": 17}, "reread"),
        ({"block_size": 2}, "reread"), ({"block_size": 2}, "slide"), ({"block_size": 2}, "roll"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prompt", ["a", "a\U0001f600\u2028bcd é" * 7])
def test_text_equals_that_of_the_generator(architecture, overflow, prompt):
    gpt = build(**architecture).eval()
    sampling = SamplingParams(max_new_tokens=120, overflow=overflow, temperature=1.5)
    expected = Generator(gpt, Tokenizer(CHARACTERS)).generate(prompt, sampling)[0]
    assert prompt + Engine(gpt).write(CHARACTERS, prompt, sampling) == expected


@pytest.mark.parametrize(
    "seed, sampling",
    [pytest.param(*case, marks=pytest.mark.slow if case[0] % 3 else ()) for case in enumerate(SAMPLINGS)],
)
def test_a_text_of_1000_characters_equals_that_of_the_generator(seed, sampling):
    gpt = build().eval()
    sampling = SamplingParams(**{"temperature": 1.5, "max_new_tokens": 1000, "seed": seed} | sampling)
    expected = Generator(gpt, Tokenizer(CHARACTERS)).generate("a", sampling)[0]
    assert "a" + Engine(gpt).write(CHARACTERS, "a", sampling) == expected


def test_a_writer_that_starts_again_in_the_middle_writes_the_same_text():
    engine, sampling = Engine(build().eval()), SamplingParams(temperature=1.5)
    code = """
        const writer = new Writer(gpt, sampling);
        const write = (count) => Array.from({ length: count }, () => writer.next().id);
        writer.start([1, 2]);
        const whole = write(9);
        writer.start([1, 2, ...whole.slice(0, 4)], 4);
        return [whole, whole.slice(0, 4).concat(write(5))]"""
    whole, continued = engine.run(code, sampling=sampling.model_dump())
    assert whole == continued


def test_rolling_with_learned_positions_is_rejected():
    sampling = SamplingParams(overflow="roll")
    with pytest.raises(Exception, match="roll needs rotary positions"):
        Engine(build(**CLASSIC).eval()).write(CHARACTERS, "a", sampling)


def test_an_empty_prompt_is_rejected():
    with pytest.raises(Exception, match="the prompt is empty"):
        Engine(build().eval()).write(CHARACTERS, "", SamplingParams())
