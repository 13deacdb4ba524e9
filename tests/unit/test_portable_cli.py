"""The commands in environments that lack something: a home folder, standard streams, a locale."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.models import export_small
from helpers.workspace import FULL, ROOT, command

COMMANDS = ("check", "profile", "summary", "sync", "plots-page", "write ज --seed 1", "dagshub user/repo")
STAGES = ("prepare", "train", "evaluate", "sample")
ASCII = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
WITHOUT_HOME = "unshare --user --map-user=54321 env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME"
ICONV = "convert the text, for example with `iconv -f LATIN1 -t UTF-8`"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_small(tmp_path_factory.mktemp("model") / "gpt", "\nabज")


def shell(line, cwd):
    """Run a line of bash, in which `minigpt` is the program of this checkout."""
    return command("bash", "-c", f'minigpt() {{ {sys.executable} -m minigpt "$@"; }}; {line}', cwd=cwd)


def write(exported, line):
    options = f"--model {exported} --compile never --max-new-tokens 5"
    return shell(line.replace("write", f"write {options}"), ROOT)


@pytest.mark.parametrize(
    "line, message",
    [
        (r"printf 'a\xff' | minigpt write", f"standard input: not UTF-8: byte 2 is 0xff; {ICONV}"),
        (r"printf '\xff\xfea\0' | minigpt write", f"standard input: not UTF-8: byte 1 is 0xff; {ICONV}"),
        ("minigpt write </dev/zero", "standard input: longer than 64 MB, the limit for a prompt"),
        ("minigpt write 0>/dev/null", "standard input: not readable: Bad file descriptor"),
        (r"minigpt write $'\xff'", f"the prompt: not UTF-8: byte 1 is 0xff; {ICONV}"),
        (r"minigpt write a --stop $'\xff'", f"--stop: not UTF-8: byte 1 is 0xff; {ICONV}"),
        ("minigpt check /dev/zero", "/dev/zero: not readable: not a regular file"),
        ("minigpt check <(echo model)", "/dev/fd/63: not readable: not a regular file"),
    ],
)
def test_input_that_is_not_text_is_one_line(exported, line, message):
    ran = write(exported, line)
    (printed,) = ran.stderr.splitlines()
    assert printed.startswith(f"minigpt: {message}")
    assert (ran.returncode, ran.stdout) == (1, "")


@pytest.mark.parametrize(
    "arguments, stdin, message",
    [
        ([], b"a\0", "the prompt: character 2, '\\x00' (U+0000), does not occur in the training"),
        (["a", "--model", "/dev/zero"], b"", "/dev/zero: no such model"),
        (["a", "--model", "/etc/passwd"], b"", "/etc/passwd: no such model"),
        (["a", "--model", "x" * 5000], b"", "xxxxx"),
    ],
)
def test_prompt_or_model_that_is_no_such_thing_is_one_line(minigpt, exported, arguments, stdin, message):
    ran = minigpt("write", "--model", exported, *arguments, stdin=stdin)
    (printed,) = ran.stderr.splitlines()
    assert printed.startswith(f"minigpt: {message}")
    assert (ran.returncode, ran.stdout) == (1, "")


@pytest.mark.slow
def test_closed_streams_and_other_locales_do_not_change_the_text(exported):
    text = write(exported, "minigpt write ज --seed 1").stdout
    assert text.startswith("ज")
    for line in (
        f"{ASCII} minigpt write ज --seed 1",
        "minigpt write ज --seed 1 <&- 2>&-",
        "printf ज | minigpt write --seed 1",
        f"printf ज | {ASCII} minigpt write --seed 1 2>&-",
        r"printf '\xef\xbb\xbfज' | minigpt write --seed 1",
    ):
        ran = write(exported, line)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, text, ""), line
    newline = write(exported, r"minigpt write $'\n' --seed 1").stdout
    assert write(exported, "minigpt write --seed 1 <&-").stdout == newline
    assert write(exported, r"printf '\r\n' | minigpt write --seed 1").stdout == newline
    assert write(exported, "minigpt write --seed 1 <&- >&- 2>&-").returncode == 0


POOR = [(WITHOUT_HOME, ""), ("env", "<&- >&- 2>&-"), *([(f"env {ASCII}", "<&-")] if FULL else [])]
"""Commands that start a program in an environment, and redirections."""


@pytest.mark.slow
@pytest.mark.parametrize("prefix, streams", POOR)
def test_stages_and_commands_run_in_poor_environments(workspace, exported, prefix, streams):
    if prefix == WITHOUT_HOME and subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    shutil.rmtree(workspace / "models", ignore_errors=True)
    programs = [f"stages.{stage}" for stage in STAGES] + [f"minigpt {name}" for name in COMMANDS]
    for program in (program.replace("write", f"write --model {exported}") for program in programs):
        ran = shell(f"{prefix} {sys.executable} -m {program} {streams}", workspace)
        if "dagshub" in program:
            assert ran.returncode == 1
            assert "&" in streams[4:] or "DAGSHUB_USER_TOKEN is not set" in ran.stderr
        else:
            assert ran.returncode == 0, (program, ran.stderr)
            assert "Traceback" not in ran.stderr
            assert " are not in " not in ran.stderr
    assert (workspace / "results/sample/metrics.json").exists()
    assert not os.path.exists(workspace / "~")


def test_damaged_results_are_named(workspace):
    results = workspace / "results"
    for name in ("train/metrics.json", "train/history.csv", "evaluate/metrics.json", "sample/metrics.json"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text("{}")
    (results / "sample/samples.txt").write_text("")
    ran = shell("minigpt summary", workspace)
    assert ran.stderr.startswith("minigpt: results: damaged (KeyError: ")
    (results / "train/metrics.json").write_text("[" * 100_000)
    ran = shell("minigpt summary", workspace)
    assert ran.stderr.startswith("minigpt: results/train/metrics.json: not metrics: ")
    assert ran.stderr.count("\n") == 1
