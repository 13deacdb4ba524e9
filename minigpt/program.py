"""Programs: :func:`run` calls one, and reports its errors.

When one process of a distributed job fails, torchrun ends the others. They delay their own messages until then, so that
the user sees only the first error.
"""

import atexit
import codecs
import errno
import gc
import getpass
import io
import os
import platform
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from minigpt.errors import Interrupted, PeerLostError, UserError, environment_integer

PEER_ERROR_DELAY = 2.0  # seconds before a process reports another one's failure, while torchrun ends it
USER_ERROR_DELAY = 10.0  # seconds in which rank 0 reports the same mistake of the user first, and ends its MLflow run
MANY_OBJECTS = 50_000  # new ones before Python looks for garbage; with 700, that takes a tenth of the imports
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FILE_ERRORS = (  # no permission, a read-only disk, a mount point, or a file in the place of a folder
    *FULL, errno.EACCES, errno.EROFS, errno.EBUSY,
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def run(main: Callable[[], None]) -> None:
    """Call ``main`` as a program, as :func:`report` does, and end the process.

    Python would take all modules apart first, which lasts 0.4 seconds for those of torch.
    """
    gc.set_threshold(MANY_OBJECTS)
    code = 0
    try:
        report(main)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        code = stop.code or 0
    if _is_observed():
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader has gone, and Python reports it
        sys.exit(code)
    os._exit(code)


def _is_observed() -> bool:
    """Return whether a profiler or debugger is active, which has work to do at the end."""
    if sys.version_info >= (3, 12) and any(map(sys.monitoring.get_tool, range(6))):
        return True
    return bool(sys.gettrace() or sys.getprofile())


def report(main: Callable[[], None]) -> None:
    """Call ``main``. Report expected errors in one line on stderr, and raise SystemExit with a code.

    Unexpected errors keep their traceback. In a distributed job it is printed with the rank and the host.
    """
    open_streams()
    provide_home()
    rank, world_size = 0, 1
    with suppress(UserError):  # `main` reports it, if it starts processes
        rank, world_size = environment_integer("RANK", 0), environment_integer("WORLD_SIZE", 1)
    prefix = "minigpt: " if world_size == 1 else f"minigpt: rank {rank} of {world_size}, on {platform.node()}: "
    try:
        main()
    except UserError as error:
        if rank:
            time.sleep(USER_ERROR_DELAY)
        message = f"{prefix if rank else 'minigpt: '}{error}"
        # An experiment with --temp or --queue runs in a copy of the repository, which DVC deletes.
        if "DVC_STAGE" in os.environ and os.environ.get("DVC_ROOT", os.getcwd()) == os.getcwd():
            message += "\nminigpt: `dvc checkout --force dvc.yaml` restores the outputs of the last successful run"
        _exit(1, message)
    except Interrupted as stop:
        _exit(128 + stop.signum, "" if rank else f"minigpt: {stop}")
    except PeerLostError as error:
        time.sleep(PEER_ERROR_DELAY)
        problem = f"stopping, because another process has failed or cannot be reached: {error}"
        _exit(1, f"{prefix}{problem}; run the same command to resume from the last checkpoint")
    except KeyboardInterrupt:
        _exit(130, "" if rank else "minigpt: interrupted")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FILE_ERRORS:
            _exit(1, prefix + describe_file_error(error))
        if is_out_of_memory(error):
            advice = "reduce the model, its context, the batch size or the number of samples"
            _exit(1, f"{prefix}not enough memory: {' '.join(str(error).split()) or 'allocation failed'}; {advice}")
        if world_size == 1:
            raise
        _exit(1, f"{prefix}failed\n{traceback.format_exc().rstrip()}")


def describe_file_error(error: OSError) -> str:
    """Return what failed, for which file if Python knows it, and what helps."""
    file = error.filename2 or error.filename  # of a copy, the second is the one that is written
    verb, advice = "write", ""
    if error.errno in FULL:
        advice = "; free some space, then run the same command"
    elif error.errno == errno.EACCES:
        verb, advice = "read or write", "; change its owner or its permissions"
    return f"cannot {verb}{f' {file}' if file else ''}: {error.strerror}{advice}"


def open_streams() -> None:
    """Connect closed standard streams to the null device, and let no character of a message end the program."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file that is opened would become this stream of child processes
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, descriptor == number)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", encoding="utf-8"))
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            # Without a locale, as under cron, the text is still UTF-8.
            unset = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if unset else None, errors=errors)


def provide_home() -> None:
    """Set HOME and LOGNAME for a user without a passwd entry, as in some containers. MLflow and DVC need them."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"minigpt-home-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
        os.environ["HOME"] = str(folder) if private else tempfile.mkdtemp(prefix="minigpt-home-")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed in Python, NumPy or torch, which raises RuntimeError on a CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def _exit(code: int, message: str) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)
