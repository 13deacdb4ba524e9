"""Control of the training loop: signals, timers, and the decision of all ranks to save or to stop."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from minigpt.errors import Interrupted, environment_integer, environment_number
from minigpt.runtime.cpu import ancestors
from minigpt.runtime.distributed import ProcessGroup

# Maximum interval between checkpoints. Overridden by MINIGPT_CHECKPOINT_SECONDS and MINIGPT_CHECKPOINT_STEPS.
CHECKPOINT_SECONDS, CHECKPOINT_STEPS = 30.0, 10_000
FIRST_CHECKPOINT_SECONDS = 5.0  # each later interval is as long as the training has run, up to the maximum
# Requests of a rank, and decisions of all ranks. Only rank 0 requests SAVE, so a sum >= STOP means stop.
CONTINUE, SAVE, STOP = 0, 1, 2
HANDLED = (signal.SIGINT, signal.SIGTERM)


class DeferredScalars:
    """Scalars of a step, read one step later so that the host never waits for the GPU."""

    _pending: tuple[int, Tensor, torch.cuda.Event] | None = None

    def push(self, step: int, values: Tensor) -> tuple[int, list[float]] | None:
        """Store the values of a step and return those of the step before; on a CPU, return the new ones."""
        if not values.is_cuda:
            return step, values.tolist()
        # Queue this copy before waiting for the previous one, so that the GPU is never idle.
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        previous = self.pop()
        self._pending = (step, host, event)
        return previous

    def pop(self) -> tuple[int, list[float]] | None:
        """Wait for the stored values and return them, if there are any."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, host, event = pending
        event.synchronize()
        return step, host.tolist()


class CheckpointTimer:
    """Timer for the next checkpoint, started after ``step`` steps, ``elapsed`` seconds after this process began.

    A killed process loses at most half of its work, or the first seconds.
    """

    def __init__(self, step: int, elapsed: float = 0.0) -> None:
        longest = environment_number("MINIGPT_CHECKPOINT_SECONDS", CHECKPOINT_SECONDS)
        self._step = step + environment_integer("MINIGPT_CHECKPOINT_STEPS", CHECKPOINT_STEPS)
        self._time = time.monotonic() + min(longest, max(FIRST_CHECKPOINT_SECONDS, elapsed))

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` steps."""
        return step >= self._step or time.monotonic() >= self._time


class Stopwatch:
    """Seconds of training without its pauses, added to the ``seconds`` that earlier processes counted."""

    def __init__(self, seconds: float) -> None:
        self._counted, self._since, self._paused = seconds, time.monotonic(), False

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._counted if self._paused else self._counted + time.monotonic() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside."""
        self._counted, self._paused = self.seconds, True
        try:
            yield
        finally:
            self._since, self._paused = time.monotonic(), False


class Signals:
    """Handler of SIGINT, of SIGTERM, and of the death of the DVC or torchrun that started this process.

    A second signal of either kind ends the process immediately.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._launchers, self._checked = launching_processes(), time.monotonic()

    def __enter__(self) -> "Signals":
        self._old_handlers = [signal.signal(signum, self._receive) for signum in HANDLED]
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in zip(HANDLED, self._old_handlers, strict=True):
            signal.signal(signum, handler)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self._received.append(signum)
        for handled in HANDLED:
            signal.signal(handled, signal.SIG_DFL)

    def first(self) -> int:
        """Return the first signal received, or 0. SIGHUP means that DVC or torchrun has died."""
        if not self._received and self._launchers and time.monotonic() - self._checked > 0.5:
            self._checked = time.monotonic()
            if launching_processes() != self._launchers:
                self._received.append(signal.SIGHUP)
        return self._received[0] if self._received else 0


class Control:
    """Agreement of all ranks on when to save and when to stop.

    Each rank sends its ``request`` along with the loss of the next step, so that agreeing costs no extra communication.
    """

    def __init__(self, group: ProcessGroup, signals: Signals, step: int) -> None:
        self._group, self._signals, self._began = group, signals, time.monotonic()
        self.restart_timer(step)

    def decide(self, step: int, total: int) -> int:
        """Update this rank's request after ``step`` steps. Return the decision: CONTINUE, SAVE or >= STOP.

        With several ranks, it is ``total``, the sum of requests in the last step that was read.
        """
        due = self._group.is_main and self._timer.due(step)
        self.request = STOP if self._signals.first() else SAVE if due else CONTINUE
        return self.request if self._group.world_size == 1 else total  # one process need not wait for the sum

    def restart_timer(self, step: int) -> None:
        """Start the timer for the next checkpoint and withdraw the request, after a checkpoint of ``step``."""
        elapsed = time.monotonic() - self._began
        self._timer, self.request = CheckpointTimer(step, elapsed), CONTINUE

    def interruption(self, step: int) -> Interrupted | None:
        """Return the exception that stops all ranks, whose checkpoint of ``step`` is saved; None without a signal."""
        signum = self._group.all_reduce_max(self._signals.first())
        if not signum:
            return None
        cause = "DVC has ended" if signum == signal.SIGHUP else f"stopped by {signal.Signals(signum).name}"
        return Interrupted(signum, f"{cause}; saved after step {step}; run the same command to resume")


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted inside, wherever the program is. A second signal ends the process."""

    def stop(signum: int, _: FrameType | None) -> None:
        for handled in HANDLED:
            signal.signal(handled, signal.SIG_DFL)
        raise Interrupted(signum, f"stopped by {signal.Signals(signum).name}; run the same command to resume")

    old_handlers = [signal.signal(signum, stop) for signum in HANDLED]
    try:
        yield
    finally:
        for signum, handler in zip(HANDLED, old_handlers, strict=True):
            signal.signal(signum, handler)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM until the process ends, because all of its work is done."""
    for signum in HANDLED:
        signal.signal(signum, signal.SIG_IGN)


def launching_processes() -> list[int]:
    """Return the pids of torchrun's agent and of DVC with its shell, if they started this process, nearest first."""
    dvc = "DVC_STAGE" in os.environ
    count = dvc + ("TORCHELASTIC_RUN_ID" in os.environ)
    chain = ancestors() if count else []
    shells = {"sh", "bash", "dash", "zsh", "ksh", "fish", "busybox"}
    if dvc and any(name in shells for _, name in chain[count - 1 : count]):
        count += 1
    return [pid for pid, _ in chain[:count]]
