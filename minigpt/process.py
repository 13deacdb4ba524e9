"""How a process uses its CPU: which cores its threads run on, and how it keeps its memory.

Call :func:`settle` before torch is imported. MINIGPT_CPU=off leaves both as the system has them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
import tempfile
from pathlib import Path

HUGE_PAGE = 1 << 21
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_HUGEPAGE = 14  # asm-generic/mman-common.h

_held: list[int] = []


def settle(alert: bool = False) -> None:
    """Place the threads and keep the memory.

    Args:
        alert: threads never sleep between two pieces of work. For writing, whose pieces take some microseconds each,
            that is a third faster; it keeps all cores busy for as long as the process lives.
    """
    if os.environ.get("MINIGPT_CPU") == "off":
        return
    place_threads(alert)
    keep_memory()


def place_threads(alert: bool = False) -> None:
    """Bind one thread to each core, so that no two share one and stall at every barrier.

    Only one process of a user can have the cores so. One that comes beside it leaves its threads unbound and lets
    them sleep while they wait. A placement that OpenMP has been told of already stays.
    """
    if {"OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY"} & set(os.environ):
        return
    lock = os.open(Path(tempfile.gettempdir()) / f"minigpt-cores-{os.getuid()}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        os.environ["OMP_WAIT_POLICY"] = "passive"
        return
    _held.append(lock)
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | ({"OMP_WAIT_POLICY": "active"} if alert else {})


def keep_memory() -> None:
    """Keep freed memory, in huge pages where the system has them, in place of returning it to the system.

    A training step allocates what the last one freed. By default glibc gives large blocks back, and the system
    clears every page anew when it is next touched: up to a third of a step. Half of the machine's memory is reserved
    as addresses, which take up memory only once they are used.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := libc.malloc(size):
        first = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(first, (block + size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        libc.free(block)
