"""The command ``minigpt``, in this process where a program of its own would prove nothing more."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers.workspace import ROOT, command, make_repository, params_with, python, set_params

from minigpt import export
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation.generator import Generator
from minigpt.model import GPT
from minigpt.params import SamplingParams, load
from minigpt.terminal import graphemes

ENVIRONMENT = os.environ | {"MINIGPT_CPU": "off", "OMP_NUM_THREADS": "1"}
COMMANDS = [
    "check",
    "compare",
    "dagshub",
    "page",
    "plots-page",
    "profile",
    "register",
    "summary",
    "sync",
    "ui",
    "write",
]


def program(*arguments, cwd=ROOT, **variables):
    """Run ``minigpt`` in a process of its own."""
    return python("-m", "minigpt", *arguments, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model that writes Latin and Devanagari."""
    folder = tmp_path_factory.mktemp("cli") / "gpt"
    torch.manual_seed(0)
    tokenizer = Tokenizer("\n abcक्षािु")
    model = GPT(params_with(model={"init": "normal"}).model, tokenizer.vocab_size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    export.export(folder, model.config, model.state_dict(), tokenizer)
    return folder


@pytest.fixture
def write(exported, minigpt):
    """A function that runs ``minigpt write`` in this process."""
    options = ("--model", exported, "--dtype", "float32", "--compile", "never")
    return lambda *arguments, **how: minigpt("write", *options, *arguments, **how)


def test_write_prints_what_the_generator_returns(exported, write):
    ran = write("ab", "--max-new-tokens", 50, "--seed", 5, "--temperature", 1.2, "--top-p", 0.9)
    sampling = SamplingParams(max_new_tokens=50, seed=5, temperature=1.2, top_p=0.9)
    text = Generator(*export.load_model(exported)).generate("ab", sampling)[0]
    assert ran.stdout.removesuffix("\n") == text.removesuffix("\n")
    assert ran.returncode == 0
    assert not ran.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_write_prints_what_the_compiled_generator_returns(exported, write):
    arguments = ("ab", "--max-new-tokens", 50, "--seed", 5)
    compiled = write(*arguments, "--compile", "always")
    assert compiled.returncode == 0, compiled.stderr
    assert write(*arguments, "--compile", "auto").stdout == compiled.stdout
    generator = Generator(*export.load_model(exported), compile="always")
    text = generator.generate("ab", SamplingParams(max_new_tokens=50, seed=5))[0]
    assert compiled.stdout.removesuffix("\n") == text.removesuffix("\n")


def test_write_reads_the_prompt_from_a_pipe(write):
    arguments = ("--max-new-tokens", 30, "--seed", 5)
    assert write(*arguments, stdin=b"ab\n").stdout == write("ab\n", *arguments).stdout
    assert write(*arguments).stdout == write("\n", *arguments).stdout


def test_stop_can_be_given_several_times(write):
    arguments = ("ab", "--max-new-tokens", 200, "--seed", 5)
    text = write(*arguments).stdout
    stopped = write(*arguments, "--stop", "no such text", "--stop", text[20:23]).stdout
    end = text.index(text[20:23], 2)
    assert stopped.removesuffix("\n") == text[:end].removesuffix("\n")


def test_stop_that_the_model_cannot_write_is_reported(write):
    printed = write("ab", "--max-new-tokens", 5, "--stop", "aZ").stderr
    assert printed == (
        "minigpt: --stop 'aZ' ends no text, because the model cannot write 'Z' (U+005A LATIN CAPITAL LETTER Z)\n"
    )


def test_write_without_a_seed_differs_each_time(write):
    assert write("ab").stdout != write("ab").stdout


def test_random_seed_is_printed_in_a_terminal_and_repeats_the_text(exported):
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "minigpt", "write", "ab", "--model", str(exported), "--max-new-tokens", "30"]
    ran = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    seed = re.fullmatch(r"minigpt: --seed (\d+)\r\n", shown)[1]
    again = subprocess.run([*arguments, "--seed", seed], cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert (again.stdout, again.stderr) == (ran.stdout, b"")


def test_write_without_a_prompt_starts_from_a_character_of_the_vocabulary(minigpt, tmp_path):
    model = GPT(params_with().model, 3)
    export.export(tmp_path / "gpt", model.config, model.state_dict(), Tokenizer("abc"))
    ran = minigpt("write", "--model", tmp_path / "gpt", "--max-new-tokens", 5, stdin=b"")
    assert re.fullmatch("a[abc]{5}\n", ran.stdout), ran


def test_unknown_character_is_named_and_can_be_skipped(write):
    ran = write("ab€c")
    message = "the prompt: character 3, '€' (U+20AC EURO SIGN), does not occur in the training text"
    assert ran.stderr == f"minigpt: {message}; use --skip-unknown to drop such characters\n"
    assert (ran.returncode, ran.stdout) == (1, "")
    arguments = ("--max-new-tokens", 20, "--seed", 1)
    skipped = write("ab€c", "--skip-unknown", *arguments)
    assert skipped.stdout == write("abc", *arguments).stdout
    assert skipped.stderr == "minigpt: dropped from the prompt: '€' (U+20AC EURO SIGN)\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-1"], "--temperature: must be at least 0, got -1"),
        (["--temperature", "nan"], "--temperature: expected a finite number, got nan"),
        (["--temperature", "1e-45"], "--temperature: must be 0, or at least 1e-06, got 1e-45"),
        (["--repetition-penalty", "1e-300"], "--repetition-penalty: must be at least 0.001, got 1e-300"),
        (["--max-new-tokens", "100000000000000"], "--max-new-tokens: must be at most 1000000000000, got 1000000000"),
        (["--seed", str(2**63)], "--seed: must be less than 9223372036854775808, got 9223372036854775808"),
        (["--seed", "9" * 5000], "--seed: expected an integer, got inf"),
        (
            ["--device", f"cuda:{'9' * 5000}"],
            "--device: expected 'auto', 'cpu', 'cuda' or 'cuda:0', got 'cuda:9",
        ),
        (["--top-p", "0"], "--top-p: must be more than 0, got 0"),
        (["--top-k", "x"], "--top-k: expected an integer, got 'x'"),
        (["--top-k", "3.5"], "--top-k: expected an integer, got 3.5"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--stop", ""], "--stop: must not be empty"),
        (["--overflow", "hop"], "--overflow: hop was renamed reread"),
        (["--overflow", "x"], "--overflow: expected 'reread', 'slide' or 'roll', got 'x'"),
        (["--compile", "kept"], "--compile: expected 'auto', 'always' or 'never', got 'kept'"),
        (["--device", "cpu:3"], "--device: expected 'auto', 'cpu', 'cuda' or 'cuda:0', got 'cpu:3'"),
        (["--device", "cuda:99"], "--device: cuda:99 is not available here; use auto or cpu"),
        (["--model", "nowhere"], "nowhere: no such model"),
        (["--temprature", "1"], "no such option"),
        (["more"], "got unexpected extra argument (more); see `minigpt write --help`"),
        (["--seed"], "option '--seed' requires an argument"),
    ],
)
def test_wrong_option_is_one_line(write, arguments, message):
    ran = write("ab", *arguments)
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"minigpt: {message}")
    assert ran.returncode == 1


def test_all_wrong_options_are_reported_together(write):
    ran = write("ab", "--top-p", "2", "--top-k", "-1")
    lines = ["minigpt: 2 mistakes", "  --top-k: must be at least 0, got -1", "  --top-p: must be at most 1, got 2"]
    assert ran.stderr.splitlines() == lines


def test_wrong_option_and_wrong_param_have_the_same_message(write, minigpt, workspace):
    set_params(workspace, {"sample": {"top_p": 2}})
    in_file = minigpt("check", cwd=workspace).stderr
    assert in_file == "minigpt: params.yaml: sample.top_p: must be at most 1, got 2\n"
    assert write("ab", "--top-p", "2").stderr == in_file.replace("params.yaml: sample.top_p", "--top-p")


def test_write_streams_and_stops_quietly_on_ctrl_c(exported):
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "minigpt", "write", "ab", "--model", str(exported)]
    program += ["--max-new-tokens", "100000000", "--compile", "never"]
    with subprocess.Popen(program, cwd=ROOT, env=ENVIRONMENT, stdout=theirs, stderr=subprocess.PIPE) as running:
        os.close(theirs)
        shown = b""
        while len(shown) < 200:  # long before all text is written
            shown += os.read(ours, 100)
        running.send_signal(signal.SIGINT)
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # the program has closed its side of the terminal
            assert shown
        assert running.wait(60) == 128 + signal.SIGINT
        assert running.stderr.read() == b""
    os.close(ours)
    assert shown.endswith(b"\r\n")


def test_write_stops_quietly_when_the_pipe_is_closed(exported):
    program = f"{sys.executable} -m minigpt write --model {exported} --max-new-tokens 100000 --compile never"
    pipe = f"echo ab | {program} | head -c 20"
    shell = ["bash", "-c", pipe + "; exit ${PIPESTATUS[1]}"]
    ran = subprocess.run(shell, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert (ran.returncode, len(ran.stdout), ran.stderr) == (128 + signal.SIGPIPE, 20, b"")


def test_graphemes_are_not_split():
    text = "क्षत्रिय नि\nabc é 👩‍👩‍👧 x"
    pieces = list(graphemes(text))
    assert "".join(pieces) == text
    assert "क्ष" in pieces
    assert "नि" in pieces
    assert "👩‍👩‍👧" in pieces
    assert not any(re.match(r"[\u0300-\u036f\u093e-\u094d\u200d]", piece) for piece in pieces)


def test_options_of_write_are_the_fields_of_sample_params(minigpt):
    shown = minigpt("write", "--help").stdout
    assert re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE) == [
        "--model", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty",
        "--stop", "--seed", "--overflow", "--dtype", "--compile", "--device", "--skip-unknown", "--help",
    ]  # fmt: skip
    shown = " ".join(shown.split())
    for field in SamplingParams.model_fields.values():
        assert field.description in shown
    assert "[default: 0.95; 0<x<=1]" in shown


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(minigpt, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    ran = minigpt(*filter(None, [name]), "--help")
    assert ran.returncode == 0
    assert ran.stdout.startswith(f"Usage: minigpt {name}".rstrip())
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_help_starts_without_torch_and_mlflow():
    ran = python("-X", "importtime", "-m", "minigpt", "write", "--help", cwd=ROOT)
    assert ran.returncode == 0
    assert not re.search(r"\b(torch|mlflow)\b", ran.stderr)


def test_group_without_a_command_shows_its_help(minigpt):
    ran = minigpt()
    assert ran.stdout == minigpt("--help").stdout
    assert (
        re.findall(r"^  ([a-z][a-z-]*)  .*[^.]\.$", ran.stdout, re.MULTILINE) == COMMANDS
    )  # no description is cut off


def test_unknown_command_and_missing_argument_are_one_line(minigpt):
    ran = minigpt("wrote")
    assert re.fullmatch(r"minigpt: no such command 'wrote'.*\n", ran.stderr)
    ran = minigpt("dagshub")
    assert ran.stderr == "minigpt: missing argument 'REPO'; see `minigpt dagshub --help`\n"
    assert ran.returncode == 1


def complete(words, cwd):
    """Return the completions of the last word."""
    variables = {
        "_MINIGPT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    shown = program(cwd=cwd, **variables).stdout.splitlines()
    return [line.removeprefix("plain,") for line in shown]


def test_shell_completion():
    script = program(_MINIGPT_COMPLETE="bash_source").stdout
    assert "_MINIGPT_COMPLETE=bash_complete" in script
    assert subprocess.run(["bash", "-n"], input=script.encode()).returncode == 0
    assert complete("minigpt ", ROOT) == COMMANDS
    assert complete("minigpt write --ove", ROOT) == ["--overflow"]
    assert complete("minigpt write --overflow ", ROOT) == ["reread", "slide", "roll"]
    kinds = ["1min", "5min", "cpu", "gpu", "quick"]
    assert complete("minigpt profile shakespeare-", ROOT) == [f"shakespeare-{kind}" for kind in kinds]


def test_check_validates_the_given_files(minigpt, workspace):
    ran = minigpt("check", cwd=workspace)
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        0,
        "minigpt: params.yaml, with data/songs.txt: no mistakes\n",
        "",
    )
    (workspace / "other.yaml").write_text("model: 3\n")
    assert "other.yaml: 5 mistakes" in minigpt("check", "params.yaml", "other.yaml", cwd=workspace).stderr
    profiles = [f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.yaml"))]
    ran = minigpt("check", *profiles, cwd=workspace)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "with data/shakespeare.txt: no mistakes, but data/shakespeare.txt does not exist\n" in ran.stdout
    (workspace / "configs/mine.yaml").write_text("# Mine.\nmodel:\n  n_layers: 3\n")
    ran = minigpt("check", "configs/mine.yaml", cwd=workspace)
    assert ran.stderr == "minigpt: configs/mine.yaml: model.n_layers: unknown key; did you mean n_layer?\n"


def test_check_takes_a_profile_and_its_params_from_the_same_folder(minigpt, workspace, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (workspace / "configs/classic-cpu.yaml").write_text("# Other values.\ntrain:\n  max_iters: oops\n")
    file = workspace / "configs/classic-cpu.yaml"
    ran = minigpt("check", file, cwd=tmp_path / "elsewhere")
    assert ran.stderr == f"minigpt: {file}: train.max_iters: expected an integer, got 'oops'\n"


@pytest.mark.parametrize("command", ["profile", "sync", "ui", "plots-page"])
def test_command_outside_a_repository_is_refused_and_writes_nothing(minigpt, tmp_path, command):
    ran = minigpt(command, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "minigpt: .dvc: no such folder; run this from the root of the repository\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--force",), ("--source", "data/songs.txt")])
def test_options_of_a_profile_need_its_name(minigpt, workspace, option):
    ran = minigpt("profile", *option, cwd=workspace)
    assert ran.stderr.startswith("minigpt: --source and --force need the NAME of a profile")
    assert ran.returncode == 1


def test_profile_lists_the_profiles_and_marks_the_present_one(minigpt, workspace):
    shutil.copy(ROOT / "params.yaml", workspace)
    lines = minigpt("profile", cwd=workspace).stdout.splitlines()
    assert [line[2:].split()[0] for line in lines if line.startswith("* ")] == ["default"]
    assert len(lines) == len(list((ROOT / "configs").glob("*.yaml")))
    assert max(map(len, lines)) <= 80
    (workspace / "data/shakespeare.txt").write_text("in place of the text that would be fetched")
    assert minigpt("profile", "shakespeare-cpu", cwd=workspace).returncode == 0
    lines = minigpt("profile", cwd=workspace).stdout.splitlines()
    assert [line[2:].split()[0] for line in lines if line.startswith("* ")] == ["shakespeare-cpu"]


@pytest.mark.parametrize("with_git", [True, False])
def test_profile_does_not_overwrite_changes_without_force(minigpt, tmp_path, project_files, workspace, with_git):
    folder = make_repository(tmp_path / "repository", project_files) if with_git else workspace
    set_params(folder, {"model": {"n_embd": 100}})
    (folder / "data/shakespeare.txt").write_text("in place of the text that would be fetched")
    before = (folder / "params.yaml").read_bytes()
    ran = minigpt("profile", "shakespeare-cpu", cwd=folder)
    assert ran.returncode == 1
    assert "params.yaml: has changes that are not committed to git" in ran.stderr
    assert (folder / "params.yaml").read_bytes() == before
    if with_git:
        assert command("git", "commit", "--quiet", "--all", "--message", "mine", cwd=folder).returncode == 0
        assert minigpt("profile", "shakespeare-cpu", cwd=folder).returncode == 0
    else:
        assert minigpt("profile", "shakespeare-cpu", "--force", cwd=folder).returncode == 0
    assert load(folder / "params.yaml").model.n_embd == 192


def test_unknown_profile_is_one_line(minigpt, workspace):
    ran = minigpt("profile", "nothing", cwd=workspace)
    assert ran.stderr == "minigpt: configs/nothing.yaml: no such profile; `minigpt profile` lists them\n"
    assert ran.returncode == 1


def test_summary_names_the_missing_stage(minigpt, workspace):
    ran = minigpt("summary", cwd=workspace)
    assert ran.stderr == "minigpt: results/train/metrics.json: no such file; `dvc repro` writes it\n"


def test_make_does_not_run_shell_text_in_repo(tmp_path):
    program = tmp_path / ".venv/bin/minigpt"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m minigpt "$@"\n')
    program.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/installed").touch()
    for repo in (
        '$(shell touch made)`touch shell`"; touch quoted; "$(touch substituted)',
        "x; touch made", "x' ; touch made '", "x\ntouch made\n", "a/b && touch made", "-x", "--help", "$$(touch made)",
    ):  # fmt: skip
        ran = command("make", "dagshub", f"REPO={repo}", cwd=tmp_path, DAGSHUB_USER_TOKEN="token", PYTHONPATH=str(ROOT))
        assert f"expected user/repo, got {repo!r}" in ran.stderr
        assert ran.returncode != 0
        assert not {path.name for path in tmp_path.iterdir()} & {"made", "shell", "quoted", "substituted"}


def test_page_contains_one_model_or_two(minigpt, exported, tmp_path):
    output = tmp_path / "new" / "page.html"
    ran = minigpt("page", "--model", exported, "--output", output)
    assert ran.stdout == f"minigpt: {output}, {output.stat().st_size / 1e6:.1f} MB; open it in a browser\n"
    assert output.read_text(encoding="utf-8").count('<script type="text/plain"') == 1
    assert minigpt("page", "--model", exported, "--compare", exported, "--output", output).returncode == 0
    assert output.read_text(encoding="utf-8").count('<script type="text/plain"') == 2


def test_page_reports_a_missing_model_and_a_wrong_dtype(minigpt, exported, tmp_path):
    ran = minigpt("page", "--model", tmp_path / "gpt")
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"minigpt: {tmp_path / 'gpt'}: no such model; train one with")
    ran = minigpt("page", "--model", exported, "--dtype", "int4")
    assert ran.returncode == 1
    assert "'int4' is not one of 'auto', 'float32', 'bfloat16', 'int8'" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_make_page_reports_a_missing_page(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in (".venv/installed", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".venv/installed", (2**31, 2**31))
    ran = command("make", "page", cwd=tmp_path)
    assert ran.returncode == 2
    assert "minigpt: no page yet; run make\n" in ran.stderr
