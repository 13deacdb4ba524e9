import errno
import signal

import pytest

from minigpt.errors import Interrupted, PeerLostError, UserError, run


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("params.yaml: wrong"), 1, "minigpt: params.yaml: wrong"),
        (Interrupted(signal.SIGTERM, "saved"), 143, "minigpt: saved"),
        (KeyboardInterrupt(), 130, "minigpt: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "cannot write a/b: No space left on device"),
    ],
)
def test_expected_error_is_reported_in_one_line(monkeypatch, capsys, error, code, line):
    monkeypatch.delenv("DVC_STAGE", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run(main)
    printed = capsys.readouterr().err
    assert exit_info.value.code == code
    assert line in printed
    assert printed.count("\n") == 1


def test_user_error_under_dvc_explains_how_to_restore_the_outputs(monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "train")

    def main():
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run(main)
    assert "dvc checkout dvc.yaml" in capsys.readouterr().err


def test_unexpected_error_keeps_its_traceback():
    def main():
        raise OSError(errno.EIO, "I/O error")

    with pytest.raises(OSError, match="I/O error"):
        run(main)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (PeerLostError("connection closed"), 1, "run the same command to resume from the last checkpoint"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 1, "cannot write a/b: Read-only file system"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_error_in_a_job_names_the_rank(monkeypatch, capsys, error, code, message):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run(main)
    printed = capsys.readouterr().err
    assert exit_info.value.code == code
    assert printed.startswith("minigpt: rank 1 of 2, on ")
    assert message in printed


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGINT, "saved"), 130)])
def test_only_rank_0_reports_an_interruption(monkeypatch, capsys, error, code):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run(main)
    assert exit_info.value.code == code
    assert not capsys.readouterr().err
