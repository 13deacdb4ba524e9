"""``python -m minigpt``, as it is typed."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers.workspace import ROOT, params_with, python

from minigpt import export
from minigpt.cli import graphemes
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation.generator import Generator
from minigpt.generation.sampling import SamplingParams
from minigpt.model import GPT

ENVIRONMENT = os.environ | {"MINIGPT_CPU": "off", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model that writes Latin and Devanagari."""
    folder = tmp_path_factory.mktemp("terminal") / "gpt"
    torch.manual_seed(0)
    tokenizer = Tokenizer("\n abcक्षािु")
    model = GPT(params_with(model={"init": "normal"}).model, tokenizer.vocab_size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    export.export(folder, model.config, model.state_dict(), tokenizer)
    return folder


def write(exported, *arguments, **options):
    command = [sys.executable, "-m", "minigpt", "--model", exported, "--dtype", "float32", "--compile", "never"]
    command += arguments
    options = {"stdin": subprocess.DEVNULL} | options
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, **options)


def test_it_writes_what_the_generator_writes(exported):
    ran = write(exported, "ab", "--max-new-tokens", 50, "--seed", 5, "--temperature", 1.2, "--top-p", 0.9)
    text = Generator(*export.load_model(exported)).generate("ab", 50, SamplingParams(1.2, top_p=0.9, seed=5))[0]
    assert ran.stdout.decode().removesuffix("\n") == text.removesuffix("\n")
    assert ran.returncode == 0
    assert not ran.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_it_writes_what_the_compiled_generator_writes(exported):
    arguments = ("ab", "--max-new-tokens", 50, "--seed", 5)
    made = write(exported, *arguments, "--compile", "always")
    assert made.returncode == 0, made.stderr
    assert write(exported, *arguments, "--compile", "kept").stdout == made.stdout
    generator = Generator(*export.load_model(exported), compiled="always")
    text = generator.generate("ab", 50, SamplingParams(0.8, top_p=0.95, seed=5))[0]
    assert made.stdout.decode().removesuffix("\n") == text.removesuffix("\n")


def test_a_prompt_comes_from_a_pipe_too(exported):
    arguments = ("--max-new-tokens", 30, "--seed", 5)
    options = {"stdin": None, "input": b"ab\n"}
    assert write(exported, *arguments, **options).stdout == write(exported, "ab\n", *arguments).stdout
    assert write(exported, *arguments).stdout == write(exported, "\n", *arguments).stdout


def test_without_a_seed_it_is_another_text_each_time(exported):
    assert write(exported, "ab").stdout != write(exported, "ab").stdout


def test_a_character_that_the_model_never_saw(exported):
    ran = write(exported, "ab€c")
    message = "the prompt: character 3, '€' (U+20AC EURO SIGN), does not occur in the training text"
    assert ran.stderr.decode() == f"minigpt: {message}; --skip-unknown leaves such characters out\n"
    assert (ran.returncode, ran.stdout) == (1, b"")
    arguments = ("--max-new-tokens", 20, "--seed", 1)
    skipped = write(exported, "ab€c", "--skip-unknown", *arguments)
    assert skipped.stdout == write(exported, "abc", *arguments).stdout
    assert "left out of the prompt: '€' (U+20AC EURO SIGN)" in skipped.stderr.decode()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-1"], "at least 0"),
        (["--top-p", "0"], "above 0"),
        (["--top-k", "x"], "invalid whole number"),
        (["--model", "nowhere"], "nowhere: no such model"),
    ],
)
def test_mistakes_are_told_in_a_line(exported, arguments, message):
    ran = write(exported, "ab", *arguments)
    assert ran.returncode in (1, 2)
    assert message in ran.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in ran.stderr


def test_it_streams_and_stops_cleanly_on_an_interrupt(exported):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "minigpt", "ab", "--model", str(exported), "--max-new-tokens", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=theirs, stderr=subprocess.PIPE) as running:
        os.close(theirs)
        shown = b""
        while len(shown) < 200:  # it shows text long before it is done
            shown += os.read(ours, 100)
        running.send_signal(signal.SIGINT)
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # how a terminal tells that the other side has closed it
            pass
        assert running.wait(60) == 128 + signal.SIGINT
        assert running.stderr.read() == b""
    os.close(ours)
    assert shown.endswith(b"\r\n")


def test_a_closed_pipe_ends_it_quietly(exported):
    pipe = f"{sys.executable} -m minigpt ab --model {exported} --max-new-tokens 100000 | head -c 20"
    shell = ["bash", "-c", pipe + "; exit ${PIPESTATUS[0]}"]
    ran = subprocess.run(shell, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert (ran.returncode, len(ran.stdout), ran.stderr) == (128 + signal.SIGPIPE, 20, b"")


def test_what_a_reader_sees_as_one_character_is_shown_whole():
    text = "क्षत्रिय नि\nabc é 👩‍👩‍👧 x"
    pieces = list(graphemes(text))
    assert "".join(pieces) == text
    assert "क्ष" in pieces
    assert "नि" in pieces
    assert "👩‍👩‍👧" in pieces
    assert not any(re.match(r"[\u0300-\u036f\u093e-\u094d\u200d]", piece) for piece in pieces)


def test_help_takes_no_torch(tmp_path):
    ran = python("-X", "importtime", "-m", "minigpt", "--help", cwd=ROOT)
    assert "--repetition-penalty" in ran.stdout
    assert "torch" not in ran.stderr


@pytest.mark.parametrize(
    "device, message",
    [
        ("nonsense", r"argument --device: 'nonsense' is no device; there are auto, cpu, cuda"),
        ("cpu:3", r"argument --device: 'cpu:3' is no device"),
        ("cuda:99", r"^minigpt: --device: there is no cuda:99 here; use auto or cpu$"),
    ],
)
def test_a_device_that_is_not_there_is_named(exported, device, message):
    ran = write(exported, "ab", "--device", device)
    assert re.search(message, ran.stderr.decode(), re.MULTILINE)
    assert b"Traceback" not in ran.stderr
    assert ran.returncode
    assert not ran.stdout
