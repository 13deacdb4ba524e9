"""Where the threads of a process run on a CPU. Call before torch is imported: OpenMP reads its settings only once."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

_held: list[int] = []


def place() -> None:
    """Bind one thread to each core, so that no two share one and stall at every barrier.

    Only one process of a user can have the cores so. One that comes beside it leaves its threads unbound and lets
    them sleep while they wait. MINIGPT_THREADS=off leaves everything to OpenMP, as does any OpenMP setting that is
    made already.
    """
    if os.environ.get("MINIGPT_THREADS") == "off" or {"OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY"} & set(
        os.environ
    ):
        return
    lock = os.open(Path(tempfile.gettempdir()) / f"minigpt-cores-{os.getuid()}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        os.environ["OMP_WAIT_POLICY"] = "passive"
        return
    _held.append(lock)
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
