"""Tests of MINIGPT_LAUNCH; integration/test_launcher.py has those of jobs."""

import pytest
from helpers.workspace import python

from minigpt.errors import UserError
from minigpt.runtime.launcher import launch


@pytest.mark.parametrize(
    "command, message",
    [
        ('"x', "MINIGPT_LAUNCH: not a command: no closing quotation"),
        ("torchrun \\", "MINIGPT_LAUNCH: not a command: no escaped character"),
        ("''", "MINIGPT_LAUNCH: cannot run '': execv() arg 2 first element cannot be empty"),
        ("no-such-program -x", "MINIGPT_LAUNCH: cannot run 'no-such-program': No such file or directory"),
        ("/", "MINIGPT_LAUNCH: cannot run '/': Permission denied"),
    ],
)
def test_wrong_command_is_one_clear_message(monkeypatch, command, message):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MINIGPT_LAUNCH", command)
    with pytest.raises(UserError) as error:
        launch("stages.train", 1)
    assert str(error.value) == message


def test_stage_reports_a_wrong_command(workspace):
    ran = python("-m", "stages.train", cwd=workspace, MINIGPT_LAUNCH='"x')
    assert (ran.returncode, ran.stderr) == (1, "minigpt: MINIGPT_LAUNCH: not a command: no closing quotation\n")
