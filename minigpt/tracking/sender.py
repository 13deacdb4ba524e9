"""A process that sends journals to the store, so that a stage neither imports MLflow nor waits for a request.

``python -m minigpt.tracking.sender`` reads keys of runs from stdin, one per line. It prints READY when MLflow is
imported, ACCEPTED for each request that the store accepts, and for each key SENT or the reason of the failure.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from minigpt.errors import UserError
from minigpt.tracking.journal import Journal
from minigpt.tracking.masking import mask_stderr
from minigpt.tracking.store import database_path, describe_error, resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

READY, ACCEPTED, SENT, FAILED = "ready", "accepted", "sent", "failed: "


class SendError(Exception):
    """Failure of an upload in the other process, as :func:`minigpt.tracking.store.describe_error` describes it."""


class Sender:
    """The process, as a stage sees it. It imports MLflow while the stage imports torch, and ends with the stage."""

    def __init__(self) -> None:
        mask_stderr()
        command = [sys.executable, "-m", "minigpt.tracking.sender"]
        # Ctrl-C reaches the whole group, but the stage still has records to send: the process inherits these blocks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.ready = threading.Event()  # also after the process has died
        self._lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, name="sender", daemon=True).start()
        atexit.register(self.stop)

    def send(self, journal: Journal, accepted: Callable[[], None]) -> None:
        """Send the records that the store does not have yet, or raise SendError; call ``accepted`` after each request.

        One thread may call this at a time.
        """
        with suppress(OSError):  # a process that has died is reported below
            print(journal.key, file=self._process.stdin, flush=True)
        while (line := self._lines.get()) != SENT:
            if not line:
                self._lines.put("")  # for the next call
                raise SendError("the process that sends the records has ended")
            if line != ACCEPTED:
                raise SendError(line.removeprefix(FAILED))
            accepted()

    def stop(self) -> None:
        """End the process, also during a request."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        for line in map(str.strip, self._process.stdout or ()):
            if line == READY:
                self.ready.set()
            else:
                self._lines.put(line)
        self.ready.set()
        self._lines.put("")


def start_sender() -> Sender | None:
    """Start the process. Return None if that is impossible: then the stage itself sends its records."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return None
    with suppress(OSError):  # too many processes
        return Sender()
    return None


def main() -> None:
    """Send the journals whose keys come from stdin, until the stage closes it or dies."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(line: str) -> None:
        print(line, file=answers, flush=True)

    keys: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_keys, args=(keys,), daemon=True).start()
    try:
        uploader = Uploader(resolve_tracking_uri(), accepted=lambda: answer(ACCEPTED))
    except UserError:  # the stage reports it too
        return
    database = database_path(uploader.store.uri)
    with suppress(Exception):  # the first upload reports it
        if database is None or database.exists():
            uploader.store.connect()
        else:  # a stage that refuses its params creates no database
            import mlflow  # noqa: F401
    answer(READY)
    while True:
        journal = Journal(keys.get())
        try:
            uploader.send(journal)
            answer(SENT)
        except Exception as error:
            answer(FAILED + " ".join(describe_error(error).split()))


def _read_keys(keys: SimpleQueue[str]) -> None:
    """Put the keys that stdin has in the queue, and end the process with the last one."""
    for line in sys.stdin:
        keys.put(line.strip())
    os._exit(0)


if __name__ == "__main__":
    main()
