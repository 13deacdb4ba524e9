import errno
import signal

import pytest

from minigpt.errors import Interrupted, UserError, run


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("params.yaml: wrong"), 1, "minigpt: params.yaml: wrong"),
        (Interrupted(signal.SIGTERM, "saved"), 143, "minigpt: saved"),
        (KeyboardInterrupt(), 130, "minigpt: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "cannot write a/b: No space left on device"),
    ],
)
def test_what_ends_a_program_on_purpose_is_a_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    monkeypatch.delenv("DVC_STAGE", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    printed = capsys.readouterr().err
    assert ended.value.code == code
    assert line in printed
    assert printed.count("\n") == 1


def test_under_dvc_a_mistake_says_how_to_get_the_last_outputs_back(monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "train")

    def main():
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run(main)
    assert "dvc checkout dvc.yaml" in capsys.readouterr().err


def test_a_fault_of_the_programs_own_keeps_its_traceback():
    def main():
        raise OSError(errno.EIO, "I/O error")

    with pytest.raises(OSError, match="I/O error"):
        run(main)
