"""Upload in the background, so that a training does not wait for a store."""

import threading
import time

from minigpt.tracking.journal import Journal
from minigpt.tracking.sender import Sender
from minigpt.tracking.store import describe_error
from minigpt.tracking.uploader import Uploader

# Total seconds that a stage waits for a remote store. `minigpt sync` sends the records that remain.
MAX_WAIT = 4.0
# Seconds without progress after which a store counts as unreachable, and seconds before it is waited for again.
UNREACHABLE_AFTER, RETRY_AFTER = 2.0, 600
# Seconds that a stage waits for a store that was recently unreachable, to learn the reason.
SHORT_WAIT = 0.25


class BackgroundUploader:
    """Sends one journal: with a sender in its process, otherwise in a thread, or to a local store in the caller's."""

    def __init__(self, uploader: Uploader, journal: Journal, sender: Sender | None = None) -> None:
        self.error: Exception | None = None  # of the last attempt
        self._uploader, self._journal, self._sender = uploader, journal, sender
        self._immediate = uploader.store.local and sender is None
        marker = uploader.unreachable_marker
        self._recently_unreachable = marker.exists() and abs(time.time() - marker.stat().st_mtime) < RETRY_AFTER
        # Total seconds that `wait` may still take. SHORT_WAIT becomes MAX_WAIT when the store accepts records again.
        self.remaining_wait = SHORT_WAIT if self._recently_unreachable else MAX_WAIT
        self._requested = self._attempted = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """Request an upload of new records.

        Without a sender, a local store has them on return, unless ``error`` was set.
        """
        if self._immediate and self.error is None:
            self._try()
        if self._immediate or not self._uploader.missing(self._journal):
            return
        if self._thread is None:
            # A database may not answer for minutes.
            if self._sender is None and self._uploader.store.uri.startswith("http"):
                try:
                    self._uploader.store.connect()
                except Exception as error:
                    self.error = error
                    return
            self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
            self._thread.start()
        with self._changed:
            self._requested += 1
            self._changed.notify_all()

    def wait(self) -> str:
        """Wait for the requested uploads. Return the reason if records are still missing, otherwise an empty string."""
        self.wait_until_ready()
        began = time.monotonic()
        # A local database is never waited for longer than DATABASE_WAIT.
        limit = None if self._uploader.store.local else self.remaining_wait
        with self._changed:
            attempted = self._changed.wait_for(lambda: self._attempted >= self._requested, limit)
        waited = time.monotonic() - began
        self.remaining_wait = max(0.0, self.remaining_wait - waited) if attempted else 0.0
        if not self._uploader.missing(self._journal):
            return ""
        stalled = time.monotonic() - self._uploader.last_success > UNREACHABLE_AFTER
        if not self._uploader.store.local and waited > SHORT_WAIT and stalled:
            self._uploader.unreachable_marker.touch()
        if self.error and attempted:
            return describe_error(self.error)
        if self._recently_unreachable:
            return "the server was unreachable a moment ago; not retrying yet"
        return f"the upload did not finish within {MAX_WAIT:g} seconds"

    def wait_until_ready(self) -> None:
        """Wait until the sender has imported MLflow."""
        if self._sender:
            self._sender.ready.wait()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requested > self._attempted)
                requested = self._requested
            self._try()
            with self._changed:
                if self._recently_unreachable and self.error is None:
                    self._recently_unreachable, self.remaining_wait = False, MAX_WAIT
                    self._uploader.unreachable_marker.unlink(missing_ok=True)
                self._attempted = requested
                self._changed.notify_all()

    def _try(self) -> None:
        try:
            if self._sender:
                self._sender.send(self._journal, self._uploader.note_success)
            else:
                self._uploader.send(self._journal)
            self.error = None
        except Exception as error:
            self.error = error
