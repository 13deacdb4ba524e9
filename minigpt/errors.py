"""What ends a program on purpose: a user's mistake, or a signal. Neither shows a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


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


def run(main: Callable[[], None]) -> None:
    """Call ``main`` as a program: mistakes and signals end in one line on standard error and an exit code."""
    try:
        main()
    except UserError as error:
        print(f"minigpt: {error}", file=sys.stderr)
        if "DVC_STAGE" in os.environ:
            print(
                "minigpt: DVC kept the outputs of the last good run; `dvc checkout dvc.yaml` brings them back",
                file=sys.stderr,
            )
        sys.exit(1)
    except Interrupted as stop:
        print(f"minigpt: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("minigpt: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"minigpt: cannot write{where}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
