"""TODO."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

CHECKPOINT_SECONDS, CHECKPOINT_STEPS = 30.0, 10_000
"""The most between two checkpoints; MINIGPT_CHECKPOINT_SECONDS and _STEPS of the environment go before."""

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish", "busybox"}
"""What may stand between DVC and the stage that it runs."""

NOTHING, SAVE, STOP = 0, 1, 2
"""What a process wishes after a step. Only the first wishes to save, so that any sum from STOP on is to stop."""


class DeferredScalars:
    """Numbers of a step, read on the host one step later, so that the host never waits for a GPU."""

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, step: int, values: Tensor | None) -> tuple[int, list[float]] | None:
        """Take the values given last and leave new ones; on a CPU, take the new ones at once."""
        taken = self._pending
        self._pending = None
        if values is not None and values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (step, host, event)
        elif values is not None:
            taken = (step, values, None)
        if taken is None:
            return None
        if taken[2] is not None:
            taken[2].synchronize()
        return taken[0], taken[1].tolist()


class CheckpointTimer:
    """When the next checkpoint is due, so many seconds or steps after that of ``step``."""

    def __init__(self, step: int) -> None:
        self._step = step + int(os.environ.get("MINIGPT_CHECKPOINT_STEPS", CHECKPOINT_STEPS))
        self._time = time.monotonic() + float(os.environ.get("MINIGPT_CHECKPOINT_SECONDS", CHECKPOINT_SECONDS))

    def at(self, step: int) -> bool:
        """Whether it is, after so many steps."""
        return step >= self._step or time.monotonic() >= self._time


class Stopwatch:
    """Seconds of training: it stands still while the training is evaluated or saved.

    Args:
        seconds: what earlier processes have counted.
    """

    def __init__(self, seconds: float) -> None:
        self._before = seconds
        self._since: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """What has been counted so far."""
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.monotonic()


class Signals:
    """What asks a training to stop: SIGINT, SIGTERM, or the death of the DVC that started it.

    A second signal, of either kind, ends the process at once.
    """

    def __init__(self) -> None:
        self._got: list[int] = []
        self._before: dict[int, Any] = {}
        self._starters = starters()
        self._looked = time.monotonic()

    def __enter__(self) -> Signals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self._got.append(signum)
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)

    def first(self) -> int:
        """The first that came, 0 for none; SIGHUP stands for a DVC that has died."""
        if not self._got and self._starters and time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            if starters() != self._starters:
                self._got.append(signal.SIGHUP)
        return self._got[0] if self._got else 0


def starters() -> list[int]:
    """The processes that this one hangs on: torchrun's agent, and DVC with the shell between them; none: empty."""
    chain = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
    if "DVC_STAGE" not in os.environ:
        return chain
    try:
        chain.append(_parent(chain[0]) if chain else os.getppid())
        if (Path("/proc") / str(chain[-1]) / "comm").read_text().strip() in SHELLS:
            chain.append(_parent(chain[-1]))
    except OSError:  # no such file system, or the process has just ended: its own id is told all the same
        return chain
    return chain


def _parent(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
