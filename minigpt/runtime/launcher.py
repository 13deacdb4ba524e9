"""Start a stage as several processes, with torchrun's own agent, and let the process that fails speak first."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
import uuid

from minigpt.errors import UserError
from minigpt.runtime.cpu import cores, keep_to_share

RESTARTS = 3
"""How often a job whose process was killed starts again by itself. What failed with an error would fail again."""


def launch(module: str, processes: int) -> bool:
    """Run ``python -m module`` as the job that is asked for, if it is more than this process.

    With MINIGPT_LAUNCH in the environment, by that command, which starts torchrun on several machines. Else as
    ``processes`` on this one, where a job whose process is killed goes on from its last checkpoint, up to RESTARTS
    times. A signal is passed on to every process, once, and their end awaited. The cores are shared out equally
    unless OMP_NUM_THREADS is set. If the job fails, this process ends with its exit code.

    Returns:
        whether a job was run; not if this process is one of a job already, or all that is asked for.

    Raises:
        UserError: there is no such command.
    """
    if "RANK" in os.environ:
        return False
    if command := shlex.split(os.environ.get("MINIGPT_LAUNCH", "")):
        try:
            os.execvp(command[0], [*command, "-m", module])  # noqa: S606 - the user's own command
        except OSError as error:
            raise UserError(f"MINIGPT_LAUNCH: {command[0]}: {error.strerror}") from None
    if processes > 1:
        _launch_here(module, processes)
    return processes > 1


def _launch_here(module: str, processes: int) -> None:
    keep_to_share()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores()) // processes)))
    logging.disable()  # what the agent would say is said here, and by the processes themselves
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for left in reversed(range(RESTARTS + 1)):
        try:
            with tempfile.TemporaryDirectory(prefix="minigpt-") as logs:
                config = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=processes,
                    logs_specs=DefaultLogsSpecs(log_dir=logs),
                    run_id=uuid.uuid4().hex,
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    local_addr="localhost",
                    max_restarts=0,
                )
                elastic_launch(config, sys.executable)("-m", module)
            return
        except SignalException as stop:
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                sys.exit(failure.exitcode)
            name = signal.Signals(-failure.exitcode).name
            killed = f"minigpt: rank {rank} of {processes} (process {failure.pid}) was killed by {name}"
            if not left:
                print(f"{killed}, the last of {RESTARTS + 1} times: this job does not start again", file=sys.stderr)
                sys.exit(128 - failure.exitcode)
            print(f"{killed}; the job goes on from its last checkpoint", file=sys.stderr)
