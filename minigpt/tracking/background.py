"""TODO."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from minigpt.tracking.journal import Journal
from minigpt.tracking.store import reason
from minigpt.tracking.uploader import Uploader

if TYPE_CHECKING:
    pass

PATIENCE = 4.0
"""Seconds in all that a stage waits for a store on another machine. What is not sent by then waits for a sync."""

SILENT, AWAY = 2.0, 600
"""A store that takes nothing for the first of these is away: for the second it is not waited for again, unless it takes
something meanwhile. Both in seconds."""

BRIEF = 0.25
"""Seconds for which any stage may wait for a store that is away, to learn why."""


class BackgroundUploader:
    """Sends one journal: in a thread where the store is on another machine, so that nobody waits for it.

    Attributes:
        error: of the last try; None after one that came through.
        patience: seconds for which ``wait`` will still wait, in all. Where the store has just been waited for in
            vain, also by another process, there is next to none until the store takes something.
    """

    def __init__(self, mirror: Uploader, journal: Journal) -> None:
        self.error: Exception | None = None
        self._mirror, self._journal = mirror, journal
        self._shy = mirror.away.exists() and abs(time.time() - mirror.away.stat().st_mtime) < AWAY
        self.patience = BRIEF if self._shy else PATIENCE
        self._asked = self._tried = 0
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have what is new sent. A store on this machine has it on return; where it fails, it is not tried again."""
        if self._mirror.local:
            if self.error is None:
                self._try()
            return
        if not self._mirror.missing(self._journal):
            return
        if self._thread is None:
            try:
                self._mirror.connect()
            except Exception as error:
                self.error = error
                return
            self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
            self._thread.start()
        with self._turn:
            self._asked += 1
            self._turn.notify_all()

    def wait(self) -> str:
        """Wait for what was asked; says what kept it from being sent, nothing where it was."""
        began = time.monotonic()
        with self._turn:
            tried = self._turn.wait_for(lambda: self._tried >= self._asked, self.patience)
        waited = time.monotonic() - began
        self.patience = max(0.0, self.patience - waited) if tried else 0.0
        if not self._mirror.missing(self._journal):
            return ""
        if not self._mirror.local and waited > BRIEF and time.monotonic() - self._mirror.taken > SILENT:
            self._mirror.away.touch()
        if self.error and tried:
            return reason(self.error)
        if self._shy:
            return "it was away a moment ago, and is not waited for again so soon"
        return f"not all was taken within {PATIENCE:g} seconds"

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._tried)
                asked = self._asked
            self._try()
            with self._turn:
                if self._shy and self.error is None:
                    self._shy, self.patience = False, PATIENCE
                    self._mirror.away.unlink(missing_ok=True)
                self._tried = asked
                self._turn.notify_all()

    def _try(self) -> None:
        try:
            self._mirror.send(self._journal)
            self.error = None
        except Exception as error:
            self.error = error
