"""What ends a program on purpose: a user's mistake, or a signal. Neither shows a traceback.

Of a job of several processes, the one that failed first speaks: the others hold back until torchrun ends them.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable

HOLD_BACK, GIVE_WAY = 2.0, 10.0
"""Seconds in which torchrun ends the other processes of a job once one has failed; in which the first process, which
must also end its tracking, tells of a mistake that all have made."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
"""What a full or forbidden disk answers."""


class UserError(Exception):
    """Something that the user can put right. Its message names the file, key or character, and the way out."""


class Interrupted(Exception):  # noqa: N818 - it is none
    """Work stopped by a signal after its state was saved.

    Attributes:
        signum: the signal; the process exits with 128 + signum, so that DVC records nothing as complete.
            A process that notices that its parent has died takes it for a SIGHUP.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class PeerLostError(Exception):
    """Another process of the job has failed, or can no longer be reached."""


def run(main: Callable[[], None]) -> None:
    """Call ``main`` as a program: mistakes and signals end in one line on standard error and an exit code."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = "" if world == 1 else f"rank {rank} of {world}, on {platform.node()}: "
    try:
        main()
    except UserError as error:
        if rank:  # most likely the first process has made the same mistake, and says so
            time.sleep(GIVE_WAY)
        print(f"minigpt: {who if rank else ''}{error}", file=sys.stderr)
        if "DVC_STAGE" in os.environ:
            print(
                "minigpt: DVC kept the outputs of the last good run; `dvc checkout dvc.yaml` brings them back",
                file=sys.stderr,
            )
        sys.exit(1)
    except Interrupted as stop:
        if not rank:
            print(f"minigpt: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except PeerLostError as error:
        time.sleep(HOLD_BACK)
        print(
            f"minigpt: {who}another process has failed or cannot be reached, so this one ends: {error}; "
            "run the same again, and it goes on from the last checkpoint",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if not rank:
            print("minigpt: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            where = f" {error.filename}" if error.filename else ""
            print(f"minigpt: {who}cannot write{where}: {error.strerror}", file=sys.stderr)
            sys.exit(1)
        if world == 1:
            raise
        print(f"minigpt: {who}failed\n{traceback.format_exc()}", file=sys.stderr, end="")
        sys.exit(1)
