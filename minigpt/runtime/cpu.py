"""CPU settings of a process: its cores, thread binding and memory.

Call :func:`configure_cpu` before torch is imported, because OpenMP reads its settings only once. Concurrent processes
share the cores: the ranks of a job, and the workers of a DVC queue. MINIGPT_CPU=off leaves everything to the system.
"""

import ctypes
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from filelock import FileLock

from minigpt.errors import environment_integer

HUGE_PAGE_BYTES = 1 << 21
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MADV_HUGEPAGE = 14  # asm-generic/mman-common.h

# A FileLock releases its file when it is garbage-collected, so these live as long as the process.
_held_locks: list[ExitStack] = []
_cores_before_binding: set[int] = set()


def configure_cpu(spin: bool = False) -> None:
    """Limit the process to its share of the cores, bind its threads, and retain its memory.

    With ``spin``, threads stay awake between two pieces of work, and keep all cores busy as long as the process lives.
    Generation is a third faster with it, because its pieces take microseconds.
    """
    if os.environ.get("MINIGPT_CPU") != "off":
        limit_to_share()
        bind_threads(spin)
        retain_memory()


def available_cores() -> list[int]:
    """Return the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cpu_info(*fields: str) -> str:
    """Return the first of ``fields`` found in /proc/cpuinfo, such as ``vendor_id``; if none is, the CPU's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return next((info[field] for field in fields if field in info), platform.processor())


def hold_locks(names: Iterable[str]) -> bool:
    """Try to take all locks ``names`` until this process ends, else none of them; return whether that succeeded.

    All processes of this user share the locks, and the system frees those of a killed process. Locks only make programs
    faster, so any failure to take one counts as a lock that another process holds.
    """
    # OSError includes filelock.Timeout. File systems without locks raise NotImplementedError.
    with ExitStack() as locks, suppress(OSError, NotImplementedError):
        folder = runtime_folder()
        for name in names:
            lock = FileLock(folder / f"{name}.lock", mode=0o600)
            locks.enter_context(lock.acquire(blocking=False))
        _held_locks.append(locks.pop_all())
        return True
    return False


def runtime_folder() -> Path:
    """Return a folder for locks that only this user can change. Raise OSError if another user has made it.

    In a shared folder, another user could make files and links with the names of the locks.
    """
    if not hasattr(os, "getuid"):  # on Windows, the folder for temporary files is the user's own
        return Path(tempfile.gettempdir())
    user = os.getuid()
    # Processes outside the login session use its folder too, so that all share the same locks.
    session = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}")
    parent = session if _is_private(session, user) else Path(tempfile.gettempdir())
    folder = parent / f"minigpt-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_private(folder, user):
        raise PermissionError(f"{folder} is not a folder that only its user can change")
    return folder


def _is_private(folder: Path, user: int) -> bool:
    """Return whether a path is a folder of this user, not a link, that no other user can read or change."""
    with suppress(OSError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
    return False


def ancestors() -> list[tuple[int, str]]:
    """Return (pid, name) of the parent, its parent and so on, up to a process that has ended or cannot be read."""
    chain = []
    with suppress(psutil.Error, OSError):
        process = psutil.Process()
        while process := process.parent():
            chain.append((process.pid, process.name()))
    return chain


def limit_to_share() -> None:
    """Limit a rank of a job, or a worker of a DVC queue, to its share of the cores, if there are enough for all."""
    if os.environ.get("MINIGPT_CPU") == "off" or not hasattr(os, "sched_setaffinity"):
        return
    cores = available_cores()
    # A rank inherits its launcher's cores, which are the share of a queue worker already.
    index, count = queue_worker()
    if os.environ.get("LOCAL_RANK"):
        index, count = environment_integer("LOCAL_RANK", 0), environment_integer("LOCAL_WORLD_SIZE", 1)
    if index < count and 1 < count <= len(cores):
        share = len(cores) // count
        os.sched_setaffinity(0, cores[index * share : (index + 1) * share])


def queue_worker() -> tuple[int, int]:
    """Return (index, count) for the DVC queue worker that started this process; (0, 1) if there is none.

    `dvc queue start -j N` starts processes `dvc exp queue-worker dvc-exp-<queue>-<number>@<host>`.
    """
    if "DVC_STAGE" not in os.environ:
        return 0, 1
    workers = {}
    with suppress(psutil.Error, OSError):
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []  # None: the process cannot be read
            if "queue-worker" in words[:-1]:
                workers[process.pid] = words[words.index("queue-worker") + 1].partition("@")[0]
    worker = next((workers[pid] for pid, _ in ancestors() if pid in workers), None)
    if worker is None:
        return 0, 1
    queue = worker.rpartition("-")[0]
    members = sorted({name for name in workers.values() if name.rpartition("-")[0] == queue})
    return members.index(worker), len(members)


def bind_threads(spin: bool) -> None:
    """Bind one OpenMP thread to each core, so that no two threads share a core and stall at every barrier.

    Concurrent processes of a user cannot bind to the same core. The later one leaves its threads unbound, and lets them
    sleep while they wait. OpenMP settings in the environment take precedence.
    """
    if {"OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY"} & set(os.environ):
        return
    cores = available_cores()
    if not hold_locks(f"core-{core}" for core in cores):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        return
    _cores_before_binding.update(cores)
    os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | ({"OMP_WAIT_POLICY": "active"} if spin else {})


def unbind_threads() -> None:
    """Let this thread and the processes that it starts run on all cores; importing torch binds it to one.

    GPU kernels are compiled by one process per available core, each of which imports torch.
    """
    if _cores_before_binding and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores_before_binding)
        for name in ("OMP_PROC_BIND", "OMP_PLACES"):  # OpenMP has read them in this process
            os.environ.pop(name, None)


def retain_memory() -> None:
    """Keep freed memory in this process, in huge pages if available, instead of returning it to the system.

    A training step allocates memory that the previous step freed. By default glibc returns large blocks, and the
    system clears every page again on the next access, which takes up to a third of a step. This reserves addresses for
    half of the machine's memory; a page takes up memory only after its first use.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):  # a C library other than glibc
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if block := libc.malloc(size):
        first = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        libc.madvise(first, (block + size - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_HUGEPAGE)
        libc.free(block)
