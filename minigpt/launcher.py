"""Start a stage as several processes, with torchrun's own agent, and let the process that fails speak first."""

from __future__ import annotations

import os
import signal
import sys
import uuid

from minigpt.process import cores, keep_to_share

RESTARTS = 3
"""How often a job whose process was killed starts again by itself. What failed with an error would fail again."""


def launched() -> bool:
    """Whether this process is one of a job already."""
    return "RANK" in os.environ


def launch(module: str, processes: int) -> None:
    """Run ``python -m module`` as a job of ``processes`` on this machine; end with its exit code unless it is 0.

    A job one of whose processes is killed goes on from its last checkpoint, up to RESTARTS times. A signal is passed
    on to every process, once, and their end awaited. The cores are shared out equally unless OMP_NUM_THREADS is set.
    """
    keep_to_share()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores()) // processes)))
    verbosity = os.environ.get("LOGLEVEL")
    os.environ["LOGLEVEL"] = "CRITICAL"  # what the agent would say is said here, and by the processes themselves
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if verbosity is None:
        del os.environ["LOGLEVEL"]
    else:
        os.environ["LOGLEVEL"] = verbosity
    for left in reversed(range(RESTARTS + 1)):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
        )
        try:
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
