"""A process that sends journals to the store, so that a stage neither imports MLflow nor waits for a request.

Importing MLflow takes longer than some stages. So the process stays for a few seconds after a stage of `dvc repro`, and
the next stage with the same folder, environment, code and store joins it through a socket.

Both sides write lines. The process says WELCOME, or closes the connection if its database is not the stage's any more,
and READY when MLflow is imported. For each key of a run that the stage writes, it answers ACCEPTED after each request
that the store accepts, and then SENT or the reason of the failure.
"""

import atexit
import gc
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from minigpt.errors import UserError
from minigpt.files import remove, workspace
from minigpt.runtime.cpu import runtime_folder
from minigpt.tracking.journal import Journal, locked
from minigpt.tracking.masking import mask, mask_stderr
from minigpt.tracking.store import database_path, describe_error, resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

WELCOME, READY, ACCEPTED, SENT, FAILED, SAYS = "welcome", "ready", "accepted", "sent", "failed: ", "says: "
LINGER = 8.0  # seconds that the process waits for the next stage of `dvc repro`
HANDSHAKE, LOCK_WAIT = 2.0, 10.0  # seconds that a stage waits for WELCOME, and until it may join or start a process


class SendError(Exception):
    """Failure of an upload in the other process, as :func:`minigpt.tracking.store.describe_error` describes it."""


def open_lines(connection: socket.socket, mode: Literal["r", "w"]) -> io.TextIOWrapper:
    """Return a connection as a stream of lines, which a message with any other character does not break."""
    return connection.makefile(mode, encoding="utf-8", errors="backslashreplace", newline="\n")


class Sender:
    """The process, as a stage sees it."""

    def __init__(
        self, connection: socket.socket, address: Path, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        mask_stderr()
        self._log = log_path(address)
        self.process = process  # None if an earlier stage started it
        self.ready = threading.Event()  # also after the process has died
        self._connection, self._keys = connection, open_lines(connection, "w")
        self._lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, name="sender", daemon=True).start()
        atexit.register(self.close)

    def send(self, journal: Journal, accepted: Callable[[], None]) -> None:
        """Send the records that the store does not have yet, or raise SendError; call ``accepted`` after each request.

        One thread may call this at a time.
        """
        with suppress(OSError, ValueError):  # a process that has died is reported below
            print(journal.key, file=self._keys, flush=True)
        while (line := self._lines.get()) != SENT:
            if not line:
                self._lines.put("")  # for the next call
                raise SendError(f"the process that sends the records has ended{self._last_words()}")
            if line != ACCEPTED:
                raise SendError(line.removeprefix(FAILED))
            accepted()

    def close(self) -> None:
        """Leave the process, which ends if it is sending."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _last_words(self) -> str:
        """Return the last line that the process has written, if it has written any."""
        with suppress(OSError):
            if lines := self._log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
                return f": {mask(lines[-1])[:300]}"
        return ""

    def _read(self) -> None:
        with suppress(OSError), open_lines(self._connection, "r") as lines:
            for line in lines:
                if line.startswith(SAYS):
                    with suppress(OSError, ValueError):  # nobody reads stderr
                        print(line.removeprefix(SAYS), end="", file=sys.stderr)
                elif line.strip() == READY:
                    self.ready.set()
                elif line.strip() != WELCOME:
                    self._lines.put(line.strip())
        self.ready.set()
        self._lines.put("")


def start_sender() -> Sender | None:
    """Join the process of an earlier stage, or start one. Return None if that is impossible.

    Then the stage itself sends its records.
    """
    if not hasattr(socket, "AF_UNIX"):  # Windows
        return None
    # Too many processes, no private folder for the socket, or an address of a store that the stage will refuse.
    with suppress(OSError, UserError):
        address = socket_path()
        with locked(address.with_name("sender"), LOCK_WAIT):
            with suppress(OSError):
                return Sender(_join(address), address)
            return _start(address)
    return None


def socket_path() -> Path:
    """Return the path of the socket, named by a digest of all on which the sending of this stage's records depends.

    Raise a UserError for a store that the stage will refuse, and OSError if no folder is private.
    """
    uri = resolve_tracking_uri()  # moves the credentials to variables
    # DVC's variables name the stage and the experiment.
    variables = sorted(pair for pair in os.environ.items() if not pair[0].startswith("DVC_"))
    code = max(file.stat().st_mtime_ns for file in Path(__file__).parents[1].rglob("*.py"))
    parts = (sys.executable, os.getcwd(), str(workspace()), code, uri, variables)
    # A socket's path has at most about 100 bytes, and not every file system has sockets.
    return runtime_folder() / f"sender-{hashlib.sha256(ascii(parts).encode()).hexdigest()[:16]}"


def log_path(address: Path) -> Path:
    """Return the file with the messages of the process, which stays if it dies."""
    return address.with_suffix(".log")


def _join(address: Path) -> socket.socket:
    """Return a connection to a running process, or raise OSError if there is none, or none that can be used."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HANDSHAKE)
    try:
        connection.connect(str(address))
        if connection.recv(len(WELCOME) + 1, socket.MSG_WAITALL).decode().strip() != WELCOME:
            raise ConnectionRefusedError(address)
    except OSError:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _start(address: Path) -> Sender:
    """Start a process. It inherits the socket, which already has the connection of this stage."""
    remove(address)
    connection = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as listener, log_path(address).open("w") as stderr:
        listener.bind(str(address))
        listener.listen()
        connection.connect(str(address))
        linger = LINGER if "DVC_STAGE" in os.environ else 0
        command = [sys.executable, "-m", "minigpt.tracking.sender", str(listener.fileno()), str(address), str(linger)]
        # Ctrl-C reaches the whole session of the stage, which still has records to send. And whoever reads the output
        # of the stage waits until no process has it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    return Sender(connection, address, process)


class Connection:
    """The connection to one stage, in the other process."""

    def __init__(self, accepted: socket.socket) -> None:
        self.lines, self._answers = open_lines(accepted, "r"), open_lines(accepted, "w")
        self._socket = accepted
        self.keys: SimpleQueue[str] = SimpleQueue()
        self.sending = False
        self._lock = threading.Lock()

    def answer(self, line: str) -> None:
        """Write a line to the stage, unless it has ended."""
        with self._lock, suppress(OSError, ValueError):
            print(line, file=self._answers, flush=True)

    def close(self) -> None:
        """End the connection, and the thread that waits for keys."""
        self.keys.put("")
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for part in (self.lines, self._answers, self._socket):
                with suppress(OSError):
                    part.close()


class Server(io.TextIOBase):
    """The process itself. As a stream, it writes to its log, and to stderr of the stages that are connected."""

    def __init__(self, listener: socket.socket, address: Path, linger: float) -> None:
        self._listener, self._address, self._linger = listener, address, linger
        self._socket = _inode(address)
        self._log = sys.stderr
        self._store = Uploader(resolve_tracking_uri()).store
        self._database: int | None = None  # inode of the file that MLflow has open
        self._connections: set[Connection] = set()
        self._joined = 0  # connections so far
        self._imported, self._partial = threading.Event(), ""
        self._lock = threading.RLock()

    def run(self) -> None:
        """Serve the stages that connect. Does not return."""
        threading.Thread(target=self._import, daemon=True).start()
        while True:
            accepted, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(Connection(accepted),), daemon=True).start()

    def write(self, text: str) -> int:
        """Write the text to the log, and complete lines to every stage that is connected."""
        with self._lock:
            self._log.write(text)
            self._log.flush()
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._tell(SAYS + line)
        return len(text)

    def _tell(self, line: str) -> None:
        for connection in self._connections:
            connection.answer(line)

    def _import(self) -> None:
        with suppress(Exception):  # the first upload reports it
            # A stage that refuses its params creates no database, and a database server may not answer for minutes.
            if self._store.uri.startswith("http") or self._database_inode():
                self._store.connect()
                self._database = self._database_inode()
            else:
                import mlflow  # noqa: F401
        with self._lock:
            self._imported.set()
            self._tell(READY)

    def _serve(self, connection: Connection) -> None:
        """Serve one stage, until it ends."""
        # A file that MLflow has open, but is not the database any more, would get all records.
        if self._database in (None, self._database_inode()):
            with self._lock:
                self._connections.add(connection)
                self._joined += 1
                connection.answer(WELCOME)
                if self._imported.is_set():
                    connection.answer(READY)
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()
            with suppress(OSError):
                for line in connection.lines:
                    connection.keys.put(line.strip())
            with self._lock:
                self._connections.discard(connection)
        joined, sending = self._joined, connection.sending
        connection.close()
        if self._linger and not sending:
            threading.Timer(self._linger, self._end, [joined]).start()
        else:  # the stage has given up the request
            self._end(joined)

    def _send(self, connection: Connection) -> None:
        """Send the journals whose keys the stage writes, one at a time."""
        self._imported.wait()  # two threads must not import it
        uploader = Uploader(self._store.uri, accepted=lambda: connection.answer(ACCEPTED))
        while key := connection.keys.get():
            connection.sending = True
            try:
                uploader.send(Journal(key))
                self._database = self._database or self._database_inode()
                outcome = SENT
            except Exception as error:
                outcome = FAILED + " ".join(describe_error(error).split())
            connection.sending = False
            connection.answer(outcome)

    def _database_inode(self) -> int | None:
        with suppress(Exception):  # an address that is not valid, which an upload reports
            path = database_path(self._store.uri)
            return _inode(path) if path else None
        return None

    def _end(self, joined: int) -> None:
        """End the process, unless a stage is connected, or more than ``joined`` have been."""
        if self._used(joined):
            return
        with suppress(OSError), locked(self._address.with_name("sender"), LOCK_WAIT):  # a stage that joins has the lock
            if self._used(joined):
                return
            if _inode(self._address) == self._socket:  # otherwise it is that of another process
                remove(self._address)
                remove(log_path(self._address))
        os._exit(0)

    def _used(self, joined: int) -> bool:
        return bool(self._connections) or self._joined > joined


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def main() -> None:
    """Run the process on the socket whose number is the first argument."""
    gc.set_threshold(50_000)  # by default, looking for garbage takes a tenth of the import
    number, address, linger = sys.argv[1:]
    server = Server(socket.socket(fileno=int(number)), Path(address), float(linger))
    sys.stdout = sys.stderr = server
    mask_stderr()
    server.run()


if __name__ == "__main__":
    main()
