"""Errors that end a program without a traceback, and numbers from environment variables."""

import os
from contextlib import suppress


class UserError(Exception):
    """Error that the user can fix. The message names the file, key or character, and the fix."""


class Interrupted(BaseException):
    """End of work that the signal ``signum`` stopped; SIGHUP if the parent has died.

    The process exits with 128 + signum, so that DVC does not record the stage as complete. No ``except Exception``
    catches it, because a signal may come anywhere.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class PeerLostError(Exception):
    """Failure of another process of the job, or of the connection to it."""


LARGEST = 1e9
"""Largest number that an environment variable may have."""


def environment_number(name: str, default: float, least: float = 0) -> float:
    """Return the number in an environment variable, or the default if it is not set or empty."""
    text = os.environ.get(name) or str(default)
    with suppress(ValueError):
        if least <= (value := float(text)) <= LARGEST:
            return value
    raise UserError(f"{name}: expected a number from {least:g} to {LARGEST:g}, got {text!r:.80}")


def environment_integer(name: str, default: int, least: int = 0) -> int:
    """Return the integer in an environment variable, or the default if it is not set or empty."""
    value = environment_number(name, default, least)
    if not value.is_integer():
        raise UserError(f"{name}: expected an integer, got {value:g}")
    return int(value)
