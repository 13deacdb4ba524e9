"""A process that sends journals to the store, so that a stage neither imports MLflow nor waits for a request.

Importing MLflow takes longer than some stages. So the process stays for a few seconds after a stage of `dvc repro`, and
the next stage of the same environment, code and store joins it through a socket in the journal's folder.

Both sides write lines. A stage begins with its identity, and the process answers WELCOME, or closes the connection if
its own identity differs. The process says READY when MLflow is imported. For each key of a run that the stage writes,
it answers ACCEPTED after each request that the store accepts, and then SENT or the reason of the failure.
"""

import atexit
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

from minigpt.errors import UserError
from minigpt.files import remove, workspace
from minigpt.tracking.journal import Journal, locked
from minigpt.tracking.masking import mask_stderr
from minigpt.tracking.store import database_path, describe_error, resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

WELCOME, READY, ACCEPTED, SENT, FAILED, SAYS = "welcome", "ready", "accepted", "sent", "failed: ", "says: "
LINGER = 8.0  # seconds that the process waits for the next stage of `dvc repro`
HANDSHAKE = 2.0  # seconds that a stage waits for WELCOME


class SendError(Exception):
    """Failure of an upload in the other process, as :func:`minigpt.tracking.store.describe_error` describes it."""


class Sender:
    """The process, as a stage sees it."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        mask_stderr()
        self.process = process  # None if an earlier stage started it
        self.ready = threading.Event()  # also after the process has died
        self._connection, self._keys = connection, connection.makefile("w", encoding="utf-8")
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
                raise SendError("the process that sends the records has ended")
            if line != ACCEPTED:
                raise SendError(line.removeprefix(FAILED))
            accepted()

    def close(self) -> None:
        """Leave the process, which ends if it is sending."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with suppress(OSError), self._connection.makefile(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(SAYS):
                    print(line.removeprefix(SAYS), end="", file=sys.stderr)
                elif line.strip() == READY:
                    self.ready.set()
                elif line.strip() != WELCOME:
                    self._lines.put(line.strip())
        self.ready.set()
        self._lines.put("")


def start_sender() -> Sender | None:
    """Join the process of an earlier stage, or start one.

    Returns:
        None if that is impossible: then the stage itself sends its records.
    """
    if not hasattr(socket, "AF_UNIX"):  # Windows
        return None
    # Too many processes, a file system without sockets, or an address of a store that the stage will refuse.
    with suppress(OSError, UserError):
        identity, address = identify(), _address()
        address.parent.mkdir(parents=True, exist_ok=True)
        with locked(address):
            with suppress(OSError):
                return Sender(_join(address, identity))
            return _start(address, identity)
    return None


def identify() -> str:
    """Return a digest of everything on which the sending of this stage's records depends."""
    # DVC's variables name the stage and the experiment.
    variables = sorted(pair for pair in os.environ.items() if not pair[0].startswith("DVC_"))
    code = max(file.stat().st_mtime_ns for file in Path(__file__).parents[1].rglob("*.py"))
    parts = (sys.executable, os.getcwd(), code, resolve_tracking_uri(), variables)
    return hashlib.sha256(ascii(parts).encode()).hexdigest()[:16]


def _address() -> Path:
    """Return the socket's path, relative because a socket's path has at most about 100 bytes."""
    return Path(os.path.relpath(workspace() / ".journal" / "sender"))


def _join(address: Path, identity: str) -> socket.socket:
    """Return a connection to a running process, or raise OSError if there is none with the same identity."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HANDSHAKE)
    try:
        connection.connect(str(address))
        connection.sendall(f"{identity}\n".encode())
        answer = connection.recv(len(WELCOME) + 1, socket.MSG_WAITALL)
        if answer.decode().strip() != WELCOME:
            raise ConnectionRefusedError(address)
    except OSError:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _start(address: Path, identity: str) -> Sender:
    """Start a process. It inherits the socket, which already has the connection of this stage."""
    remove(address)
    connection = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        connection.connect(str(address))
        connection.sendall(f"{identity}\n".encode())
        linger = LINGER if "DVC_STAGE" in os.environ else 0
        command = [sys.executable, "-m", "minigpt.tracking.sender", str(listener.fileno()), identity, str(linger)]
        # Ctrl-C reaches the whole session of the stage, which still has records to send. And whoever reads the output
        # of the stage waits until no process has it.
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[listener.fileno()], start_new_session=True
        )
    return Sender(connection, process)


class Connection:
    """The connection to one stage, in the other process."""

    def __init__(self, accepted: socket.socket) -> None:
        self.lines, self._answers = accepted.makefile(encoding="utf-8"), accepted.makefile("w", encoding="utf-8")
        self.keys: SimpleQueue[str] = SimpleQueue()
        self.sending = False
        self._lock = threading.Lock()

    def answer(self, line: str) -> None:
        """Write a line to the stage, unless it has ended."""
        with self._lock, suppress(OSError):
            print(line, file=self._answers, flush=True)


class Server(io.TextIOBase):
    """The process itself. As a stream, it writes lines to stderr of the stages that are connected."""

    def __init__(self, listener: socket.socket, identity: str, linger: float) -> None:
        self._listener, self._identity, self._linger = listener, identity, linger
        self._address = _address().resolve()  # DVC deletes the copy in which it runs an experiment
        self._socket = _inode(self._address)
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
        """Write the complete lines to every stage that is connected."""
        with self._lock:
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._tell(SAYS + line)
        return len(text)

    def _tell(self, line: str) -> None:
        for connection in self._connections:
            connection.answer(line)

    def _import(self) -> None:
        path = database_path(self._store.uri)
        with suppress(Exception):  # the first upload reports it
            if path is None or path.exists():
                self._store.connect()
                self._note_database()
            else:  # a stage that refuses its params creates no database
                import mlflow  # noqa: F401
        with self._lock:
            self._imported.set()
            self._tell(READY)

    def _serve(self, connection: Connection) -> None:
        """Serve one stage, until it ends."""
        with suppress(OSError):
            if connection.lines.readline().strip() != self._identity or self._database_was_replaced():
                return
            with self._lock:
                self._connections.add(connection)
                self._joined += 1
                connection.answer(WELCOME)
                if self._imported.is_set():
                    connection.answer(READY)
            threading.Thread(target=self._send, args=(connection,), daemon=True).start()
            for line in connection.lines:
                connection.keys.put(line.strip())
        with self._lock:
            self._connections.discard(connection)
        if self._linger and not connection.sending:
            threading.Timer(self._linger, self._end, [self._joined]).start()
        else:  # the stage has given up the request
            self._end(self._joined)

    def _send(self, connection: Connection) -> None:
        """Send the journals whose keys the stage writes, one at a time."""
        self._imported.wait()  # two threads must not import it
        uploader = Uploader(self._store.uri, accepted=lambda: connection.answer(ACCEPTED))
        while True:
            journal = Journal(connection.keys.get())
            connection.sending = True
            try:
                uploader.send(journal)
                self._note_database()
                outcome = SENT
            except Exception as error:
                outcome = FAILED + " ".join(describe_error(error).split())
            connection.sending = False
            connection.answer(outcome)

    def _note_database(self) -> None:
        if self._database is None and (path := database_path(self._store.uri)):
            self._database = _inode(path)

    def _database_was_replaced(self) -> bool:
        """Return whether MLflow has a file open that is not the database any more, and would get all records."""
        path = database_path(self._store.uri)
        return self._database is not None and path is not None and _inode(path) != self._database

    def _end(self, joined: int) -> None:
        """End the process, unless a stage is connected, or more than ``joined`` have been."""
        with suppress(OSError), locked(self._address):  # a stage that joins has the lock; the folder may be gone
            if self._connections or self._joined > joined:
                return
            if _inode(self._address) == self._socket:  # otherwise it is that of another process
                remove(self._address)
        os._exit(0)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def main() -> None:
    """Run the process on the socket whose number is the first argument."""
    number, identity, linger = sys.argv[1:]
    server = Server(socket.socket(fileno=int(number)), identity, float(linger))
    sys.stdout = sys.stderr = server
    mask_stderr()
    server.run()


if __name__ == "__main__":
    main()
