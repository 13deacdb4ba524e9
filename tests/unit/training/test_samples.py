import pytest
import torch
from helpers.models import ARCHITECTURES, build

from minigpt.data.tokenizer import Tokenizer
from minigpt.generation.generator import Generator
from minigpt.params import SamplingParams
from minigpt.training.samples import indented, write_sample

TOKENIZER = Tokenizer("\n abcdefghi")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("prompt", ["\n", "a bad cabbage faced a deaf bee"])
def test_sample_is_the_text_of_the_generator(architecture, prompt):
    gpt = build(**architecture).train()
    expected = Generator(gpt.eval(), TOKENIZER).generate(prompt, SamplingParams(max_new_tokens=100, seed=7))[0]
    ids = write_sample(gpt.train(), TOKENIZER.encode(prompt).tolist(), 100, 7)
    assert prompt + TOKENIZER.decode(ids) == expected


def test_sample_changes_neither_the_mode_nor_the_random_numbers_of_a_model():
    gpt = build().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_sample(gpt, [1], 20, 0)
    assert torch.equal(torch.rand(3), expected)
    assert gpt.training
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("prompt, used", [("\n", "\n"), ("a z", "a "), ("xyz", "\n")])
def test_prompt_loses_unknown_characters(prompt, used):
    assert TOKENIZER.usable_prompt(prompt) == used


def test_printed_sample_cannot_control_a_terminal():
    assert indented("a\x1b[2J\r\n\n" + "b" * 100) == "  | a\ufffd[2J\ufffd\n  |\n  | " + "b" * 75
