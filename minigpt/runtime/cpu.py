"""How a process uses its CPU: which cores its threads run on, and how it keeps its memory.

Call :func:`configure_cpu` before torch is imported. MINIGPT_CPU=off leaves both as the system has them.

Processes that train at once share the cores out: those of one job, and the workers of DVC's queue.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import sys
import tempfile
from pathlib import Path

HUGE_PAGE = 1 << 21

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

MADV_HUGEPAGE = 14  # asm-generic/mman-common.h

_held: list[int] = []

_share: set[int] = set()


def configure_cpu(spin: bool = False) -> None:
    """CacheSlice the threads and keep the memory.

    Args:
        spin: threads never sleep between two pieces of work. For writing, whose pieces take some microseconds each,
            that is a third faster; it keeps all cores busy for as long as the process lives.
    """
    keep_to_share()
    if os.environ.get("MINIGPT_CPU") == "off":
        return
    place_threads(spin)
    keep_memory()


def cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def processor(*fields: str) -> str:
    """What Linux says of the processor in the first of these fields that it has, such as its maker (vendor_id)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # there is no such file but on Linux
        lines = []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return next((said[field] for field in fields if field in said), platform.processor())


def keep_to_share() -> None:
    """Keep to this process's share of the cores: as a worker of DVC's queue, and as one process of a job.

    Where there are fewer cores than processes, the system places them.
    """
    if os.environ.get("MINIGPT_CPU") == "off" or not hasattr(os, "sched_setaffinity"):
        return
    place = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for index, count in (place,) if "LOCAL_RANK" in os.environ else (queue_worker(), place):
        here = cores()
        if 1 < count <= len(here):
            each = len(here) // count
            os.sched_setaffinity(0, here[index * each : (index + 1) * each])


def queue_worker() -> tuple[int, int]:
    """Which of how many workers of DVC's queue has started this process; (0, 1) if none has.

    `dvc queue start -j N` starts processes `dvc exp queue-worker dvc-exp-<queue>-<number>@<host>`.
    """
    workers = {}
    try:
        for entry in Path("/proc").iterdir() if "DVC_STAGE" in os.environ else ():
            words = _words(entry) if entry.name.isdigit() else []
            if "queue-worker" in words[:-1]:
                workers[int(entry.name)] = words[words.index("queue-worker") + 1].partition("@")[0]
    except OSError:  # there is no such file system but on Linux
        return 0, 1
    pid = os.getpid()
    while pid > 1 and pid not in workers:
        pid = _parent(pid)
    if pid not in workers:
        return 0, 1
    queue = workers[pid].rpartition("-")[0]
    fellows = sorted({name for name in workers.values() if name.rpartition("-")[0] == queue})
    return fellows.index(workers[pid]), len(fellows)


def _words(process: Path) -> list[str]:
    """The command line of a process; empty if it has just ended."""
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """The process that started ``pid``; 0 if it has just ended."""
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def place_threads(spin: bool = False) -> None:
    """Bind one thread to each core, so that no two share one and stall at every barrier.

    Only one process of a user can have a core so. One that comes beside it leaves its threads unbound and lets
    them sleep while they wait. A placement that OpenMP has been told of already stays.
    """
    if {"OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY"} & set(os.environ):
        return
    locks: list[int] = []
    try:
        for core in cores():
            name = f"minigpt-core-{core}-{os.getuid()}.lock"
            locks.append(os.open(Path(tempfile.gettempdir()) / name, os.O_CREAT | os.O_RDWR, 0o600))
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for lock in locks:
            os.close(lock)
        os.environ["OMP_WAIT_POLICY"] = "passive"
        return
    _held.extend(locks)
    _share.update(cores())
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | ({"OMP_WAIT_POLICY": "active"} if spin else {})


def unbind() -> None:
    """Let this thread, and those that it starts, run on all of the process's cores: for what computes on a GPU.

    Importing torch has bound it to one, and a GPU's kernels are compiled by as many processes as it may use cores.
    """
    if _share and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _share)


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
