import itertools
import json
import os
import signal
import sys
import time

import pytest
import torch
from helpers.workspace import ROOT, command, python

from minigpt.errors import Interrupted
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from minigpt.training.control import (
    CONTINUE,
    SAVE,
    STOP,
    CheckpointTimer,
    Control,
    DeferredScalars,
    Signals,
    Stopwatch,
    interruptible,
    launching_processes,
)

CPU = torch.device("cpu")
PRINT_LAUNCHERS = "from minigpt.training.control import launching_processes as f; import os; print([f(), os.getppid()])"


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setenv("MINIGPT_CHECKPOINT_STEPS", "0")


def test_timer_is_due_after_steps(monkeypatch):
    monkeypatch.setenv("MINIGPT_CHECKPOINT_STEPS", "5")
    timer = CheckpointTimer(10)
    assert [timer.due(step) for step in (11, 14, 15, 16)] == [False, False, True, True]


def test_timer_is_due_after_seconds(monkeypatch):
    monkeypatch.setenv("MINIGPT_CHECKPOINT_SECONDS", "0.05")
    timer = CheckpointTimer(10)
    assert not timer.due(11)
    time.sleep(0.06)
    assert timer.due(11)


@pytest.mark.parametrize("elapsed, interval", [(0, 5), (3, 5), (12, 12), (100, 30)])
def test_interval_grows_with_the_training_to_its_maximum(elapsed, interval):
    before = time.monotonic()
    assert before + interval <= CheckpointTimer(10, elapsed)._time <= time.monotonic() + interval


def test_signal_raises_wherever_the_program_is_and_no_exception_handler_stops_it():
    with pytest.raises(Interrupted, match="stopped by SIGTERM; run the same command to resume"), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception as error:
            raise AssertionError from error


def test_stopwatch_does_not_count_pauses():
    clock = Stopwatch(100.0)
    with clock.paused():
        before = clock.seconds
        time.sleep(0.05)
        assert clock.seconds == before
    assert before <= clock.seconds < before + 0.05
    time.sleep(0.05)
    assert clock.seconds >= before + 0.05


def test_scalars_on_cpu_are_returned_immediately():
    scalars = DeferredScalars()
    assert scalars.push(3, torch.tensor([1.0, 2.0])) == (3, [1.0, 2.0])
    assert scalars.pop() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scalars_on_gpu_are_returned_one_step_late():
    scalars = DeferredScalars()
    assert scalars.push(3, torch.tensor([1.0, 2.0], device="cuda")) is None
    assert scalars.push(4, torch.tensor([3.0, 4.0], device="cuda")) == (3, [1.0, 2.0])
    assert scalars.pop() == (4, [3.0, 4.0])
    assert scalars.pop() is None


def test_sum_of_requests_is_stop_only_if_a_rank_requests_it():
    for first, *others in itertools.product((CONTINUE, SAVE, STOP), (CONTINUE, STOP), (CONTINUE, STOP)):
        total = sum((first, *others))
        assert (total >= STOP) == (STOP in (first, *others))
        assert (total > CONTINUE) == any((first, *others))


def test_single_process_decides_by_its_own_request(always_due):
    with Signals() as signals:
        control = Control(SINGLE_PROCESS, signals, 0)
        assert control.decide(1, CONTINUE) == SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.decide(2, CONTINUE) == STOP
        stop = control.interruption(2)
    assert isinstance(stop, Interrupted)
    assert stop.signum == signal.SIGTERM
    assert str(stop) == "stopped by SIGTERM; saved after step 2; run the same command to resume"


@pytest.mark.parametrize("rank, request_when_due", [(0, SAVE), (1, CONTINUE)])
def test_ranks_decide_by_the_sum_and_only_rank_0_requests_to_save(always_due, rank, request_when_due):
    with Signals() as signals:
        control = Control(ProcessGroup(rank, 2, CPU), signals, 0)
        assert control.request == CONTINUE
        assert control.decide(1, CONTINUE) == CONTINUE
        assert control.request == request_when_due
        assert control.decide(2, SAVE) == SAVE
        control.restart_timer(2)
        assert control.request == CONTINUE
        os.kill(os.getpid(), signal.SIGINT)
        assert control.decide(3, CONTINUE) == CONTINUE
        assert control.request == STOP


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_second_signal_of_either_kind_ends_the_process_immediately(second):
    code = (
        "import os, signal, time; from minigpt.training.control import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert signals.first() == signal.SIGINT\n"
        f"    os.kill(os.getpid(), signal.{second}); time.sleep(60); print('still here')"
    )
    ran = python("-c", code, cwd=ROOT)
    assert ran.returncode == -getattr(signal, second)
    assert ran.stdout == ""


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_but_dvc_or_torchrun_counts_as_a_launcher(monkeypatch):
    for name in ("DVC_STAGE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launching_processes() == []


@pytest.mark.parametrize(
    "variables, through_shell, expected",
    [
        ({"DVC_STAGE": "train"}, False, ["parent"]),
        ({"TORCHELASTIC_RUN_ID": "1", "DVC_STAGE": "train"}, True, ["parent", "test"]),
    ],
)
def test_launching_processes_are_agent_dvc_and_its_shell(variables, through_shell, expected):
    program = [sys.executable, "-c", PRINT_LAUNCHERS]
    if through_shell:  # a command after the program, so that the shell does not replace itself with the program
        program = ["sh", "-c", f"{sys.executable} -c '{PRINT_LAUNCHERS}'; true"]
    ran = command(*program, cwd=ROOT, **variables)
    assert ran.returncode == 0, ran.stderr
    found, parent = json.loads(ran.stdout)
    assert found == [{"parent": parent, "test": os.getpid()}[name] for name in expected]
