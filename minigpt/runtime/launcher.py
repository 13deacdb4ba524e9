"""Launcher of a stage in several processes, with torchrun's agent."""

import logging
import os
import shlex
import signal
import sys
import tempfile
import uuid

from minigpt.errors import UserError
from minigpt.runtime.cpu import available_cores, limit_to_share

MAX_RESTARTS = 3  # after a process was killed; a process that fails with an error would fail again


def launch(module: str, processes: int) -> bool:
    """Run ``python -m module`` as a distributed job, and return True; return False in a job or for one process.

    If MINIGPT_LAUNCH is set, replace this process by that command, for example a torchrun on several machines.
    Otherwise start ``processes`` processes on this machine. If one is killed, the job restarts from its last
    checkpoint. A signal is passed to every process once, and this process waits until they end. They share the cores
    equally unless OMP_NUM_THREADS is set. If the job fails, this process exits with its code.
    """
    if "RANK" in os.environ:
        return False
    try:
        command = shlex.split(os.environ.get("MINIGPT_LAUNCH", ""))
    except ValueError as error:
        raise UserError(f"MINIGPT_LAUNCH: not a command: {str(error).lower()}") from None
    if command:
        try:
            os.execvp(command[0], [*command, "-m", module])  # noqa: S606 - the user's own command
        except (OSError, ValueError) as error:  # ValueError: an empty name
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"MINIGPT_LAUNCH: cannot run {command[0]!r}: {reason}") from None
    if processes > 1:
        _launch_locally(module, processes)
    return processes > 1


def _launch_locally(module: str, processes: int) -> None:
    limit_to_share()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(available_cores()) // processes)))
    logging.disable()  # this module and the processes print their own messages
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for restarts_left in reversed(range(MAX_RESTARTS + 1)):
        try:
            with tempfile.TemporaryDirectory(prefix="minigpt-") as logs:
                config = LaunchConfig(
                    min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, run_id=uuid.uuid4().hex,
                    rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
                    logs_specs=DefaultLogsSpecs(log_dir=logs),
                )  # fmt: skip
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
            if not restarts_left:
                print(f"{killed}; not restarting again after {MAX_RESTARTS} restarts", file=sys.stderr)
                sys.exit(128 - failure.exitcode)
            print(f"{killed}; restarting the job from its last checkpoint", file=sys.stderr)
