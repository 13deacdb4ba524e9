"""MLflow's pages with the runs of this repository."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from minigpt.errors import UserError
from minigpt.tracking.journal import EXPERIMENT
from minigpt.tracking.store import Store, describe_error, resolve_tracking_uri
from minigpt.tracking.uploader import TIMEOUT

HOST = "127.0.0.1"
START_SECONDS = 120  # the first start imports MLflow, and may upgrade an old database
MOST_LOG_LINES = 5


def show_runs(port: int) -> None:
    """Serve the local store until Ctrl-C, and print the address of the run table. For a server, print its address."""
    store = Store(resolve_tracking_uri(), TIMEOUT)
    if not store.local:
        print(f"minigpt: the runs are in {_run_table(store, store.display_uri)}")
        return
    check_port(port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server must not outlive this program
    address = _run_table(store, f"http://{HOST}:{port}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "mlflow.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store.uri]
            options = ["--host", HOST, "--port", str(port), "--workers", "1"]
            # Its background jobs are for the evaluation of language models, and start more processes.
            variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            server = subprocess.Popen(command + options, stdout=file, stderr=file, env=variables)
        try:
            _wait_until_ready(server, port, log)
            print(f"minigpt: the runs are in {address} (Ctrl-C stops it; --port or PORT changes the port)", flush=True)
            server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _stop(server)
    raise UserError(f"MLflow's server has stopped with exit code {server.returncode}")


def check_port(port: int) -> None:
    """Raise a UserError if another program listens on a port."""
    with socket.socket() as probe:
        if os.name != "nt":  # on Windows, this option would allow two servers on one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            advice = f"choose another one: `minigpt ui --port {port + 1}` or `make ui PORT={port + 1}`"
            raise UserError(f"port {port} of {HOST} cannot be used ({error.strerror}); {advice}") from None


def _run_table(store: Store, address: str) -> str:
    """Return the address of the experiment's run table in MLflow's page at ``address``."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    try:
        number = store.experiment_id(name)
    except UserError:
        raise
    except Exception as error:
        problem = f"{store.display_uri}: cannot open the experiment '{name}': {describe_error(error)}"
        here = "`MINIGPT_TRACKING=local make sync ui` shows the runs of this repository"
        raise UserError(f"{problem}; {here}" if not store.local else problem) from None
    # MLflow 3 opens an experiment in a view for language models, which has no runs. MLflow 2 ignores the parameter.
    return f"{address}/#/experiments/{number}/runs?workflowType=machine_learning"


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its child processes."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server.pid).children(recursive=True):
            process.terminate()
    server.terminate()
    server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    raise UserError("\n  ".join(["MLflow's server does not start:", *lines[-MOST_LOG_LINES:]]))
