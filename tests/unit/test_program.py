import errno
import signal

import pytest
import torch
from helpers.workspace import ROOT, python

from minigpt import program
from minigpt.errors import Interrupted, PeerLostError, UserError, environment_integer, environment_number

LESS_MEMORY = "reduce the model, its context, the batch size or the number of samples"


@pytest.fixture
def report(monkeypatch, capsys):
    """Function that runs a program which raises ``error`` and returns its exit code and its messages."""
    monkeypatch.delenv("DVC_STAGE", raising=False)

    def report(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as exit_info:
            program.report(main)
        return exit_info.value.code, capsys.readouterr().err

    return report


@pytest.fixture
def rank_1_of_2(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3), ("sys.exit()", 0)])
def test_program_ends_with_its_code_after_its_exit_handlers_and_before_its_modules(tmp_path, end, code):
    class_with_finalizer = "class Last:\n    def __del__(self): print('taken apart')\n"
    main = f"def main():\n    atexit.register(print, 'handled')\n    print('done', end=' ')\n    {end or 'pass'}\n"
    code_before = f"import atexit, sys\nfrom minigpt import program\n{class_with_finalizer}last = Last()\n{main}"
    ran = python("-c", f"{code_before}program.run(main)", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "done handled\n", "")


def test_profiler_writes_its_report(tmp_path):
    (tmp_path / "program.py").write_text("from minigpt import program\nprogram.run(lambda: None)\n")
    ran = python("-m", "cProfile", "program.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert ran.returncode == 0, ran.stderr
    assert "function calls" in ran.stdout


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("params.yaml: wrong"), 1, "minigpt: params.yaml: wrong\n"),
        (Interrupted(signal.SIGTERM, "saved"), 143, "minigpt: saved\n"),
        (KeyboardInterrupt(), 130, "minigpt: interrupted\n"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            1,
            f"minigpt: not enough memory: Unable to allocate 9 TiB; {LESS_MEMORY}\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "source", None, "copy"),
            1,
            "minigpt: cannot write copy: No space left on device; free some space, then run the same command\n",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "a/b"),
            1,
            "minigpt: cannot read or write a/b: Permission denied; change its owner or its permissions\n",
        ),
        (OSError(errno.EISDIR, "Is a directory"), 1, "minigpt: cannot write: Is a directory\n"),
    ],
)
def test_expected_error_is_reported_in_one_line(report, error, code, line):
    assert report(error) == (code, line)


def test_failed_allocation_of_torch_is_reported_in_one_line(report):
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 45)
    code, message = report(error.value)
    assert code == 1
    assert message.startswith("minigpt: not enough memory: ")
    assert message.endswith(f"; {LESS_MEMORY}\n")
    assert message.count("\n") == 1


def test_user_error_under_dvc_explains_how_to_restore_the_outputs(report, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    assert "`dvc checkout --force dvc.yaml`" in report(UserError("wrong"))[1]
    monkeypatch.setenv("DVC_ROOT", "/the/main/workspace")  # of an experiment in a copy
    assert report(UserError("wrong"))[1] == "minigpt: wrong\n"


def test_unexpected_error_keeps_its_traceback(report):
    with pytest.raises(OSError, match="I/O error"):
        report(OSError(errno.EIO, "I/O error"))


@pytest.mark.parametrize(
    "error, message",
    [
        (PeerLostError("connection closed"), "run the same command to resume from the last checkpoint\n"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "cannot write a/b: Read-only file system\n"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero\n"),
    ],
)
def test_error_in_a_job_names_the_rank(report, rank_1_of_2, error, message):
    code, printed = report(error)
    assert code == 1
    assert printed.startswith("minigpt: rank 1 of 2, on ")
    assert printed.endswith(message)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(signal.SIGINT, "saved")])
def test_only_rank_0_reports_an_interruption(report, rank_1_of_2, error):
    assert report(error) == (130, "")


def test_numbers_in_the_environment_are_checked(monkeypatch):
    assert environment_number("MINIGPT_TEST", 2.5) == 2.5
    for text, value in [("", 7), ("0.5", 0.5), (" 1e3 ", 1000)]:
        monkeypatch.setenv("MINIGPT_TEST", text)
        assert environment_number("MINIGPT_TEST", 7) == value
    for text in ("soon", "-1", "nan", "inf", "1e10", "30s"):
        monkeypatch.setenv("MINIGPT_TEST", text)
        with pytest.raises(UserError, match=rf"MINIGPT_TEST: expected a number from 0 to 1e\+09, got '{text}'"):
            environment_number("MINIGPT_TEST", 7)
    monkeypatch.setenv("MINIGPT_TEST", "1.5")
    with pytest.raises(UserError, match=r"MINIGPT_TEST: expected an integer, got 1\.5"):
        environment_integer("MINIGPT_TEST", 1)


def test_rank_that_is_no_number_does_not_hide_a_message(report, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    assert report(UserError("a message")) == (1, "minigpt: a message\n")
