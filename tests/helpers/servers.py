"""Real servers on the loopback interface, environments with other packages, and a proxy that injects faults."""

import base64
import contextlib
import hashlib
import http.client
import http.server
import os
import secrets
import shutil
import site
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock
from werkzeug.security import generate_password_hash

from helpers.workspace import search_path

TOKEN = secrets.token_hex(10)
"""User and password of every server here. DagsHub accepts a token as both."""

MLFLOW_2_7_1 = ["mlflow==2.7.1", "Flask-WTF<2", "gunicorn<24", "setuptools<81", "sqlalchemy<2.1", "--only-binary=:all:"]
"""The version that DagsHub hosts, with dependencies from that time."""

CACHE = Path(os.environ.get("MINIGPT_TESTS_CACHE", Path.home() / ".cache/minigpt-tests"))


def environment(*requirements, extends=False):
    """Return the interpreter of an environment with these packages, created once. Skip the test without an index.

    With ``extends``, it has the packages of the present environment, too.
    """
    name = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    python = CACHE / name / "bin/python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if (CACHE / name / "complete").exists():
            return python
        shutil.rmtree(CACHE / name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", CACHE / name], check=True)
        if extends:
            (packages,) = (CACHE / name).glob("lib/python*/site-packages")
            (packages / "extends.pth").write_text("\n".join(site.getsitepackages()))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        installed = subprocess.run([*install, *requirements], capture_output=True, text=True)
        if installed.returncode:
            shutil.rmtree(CACHE / name)
            pytest.skip(f"{requirements[0]} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
        (CACHE / name / "complete").touch()
    return python


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(*arguments, url, cwd, **variables):
    """Run a server program until the block ends. The block starts when the server answers at ``url``."""
    dropped = ("MLFLOW_", "DAGSHUB_", "DVC_", "AWS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    with (cwd / "server.log").open("w") as log:
        server = subprocess.Popen(
            list(map(str, arguments)), cwd=cwd, stdout=log, stderr=log, start_new_session=True,
            env=kept | {"PATH": f"{Path(arguments[0]).parent}:{os.environ['PATH']}", "HOME": str(cwd), **variables},
        )  # fmt: skip
        try:
            while not answers(url):
                assert server.poll() is None, (cwd / "server.log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def mlflow_server(python, folder, backend="sqlite:///store.db"):
    """Run the MLflow server of an environment, with basic authentication."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
        f"admin_username = {TOKEN}\nadmin_password = {TOKEN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port = free_port()
    with process(
        python, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", port,
        "--workers", "1", "--backend-store-uri", backend, "--artifacts-destination", folder / "artifacts",
        url=f"http://127.0.0.1:{port}", cwd=folder,
        MLFLOW_AUTH_CONFIG_PATH=str(folder / "auth.ini"), MLFLOW_FLASK_SERVER_SECRET_KEY="only a test",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    ) as url:  # fmt: skip
        # The server's own hash takes it 0.1 s for each request.
        with contextlib.closing(sqlite3.connect(folder / "users.db")) as users, users:
            users.execute("UPDATE users SET password_hash = ?", [generate_password_hash(TOKEN, "pbkdf2:sha256:1")])
        yield url


class Loopback:
    """HTTP server in threads of this process, for the duration of the block."""

    def __init__(self):
        self.requests = []
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                """Requests are counted, not printed."""

            def handle_one(self):
                outer.requests.append((self.command, self.path))
                outer.answer(self, self.body())

            def body(self):
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                whole = b""
                while size := int(self.rfile.readline(), 16):
                    whole += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return whole

            def reply(self, status, body=b"", headers=()):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                if self.command != "HEAD" or "Content-Length" not in dict(headers):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body):
        """Answer one request."""
        raise NotImplementedError


class Proxy(Loopback):
    """Proxy of servers, each under a prefix of the path, that injects faults.

    Attributes:
        fault: None; an HTTP status; ``hang`` (no response); ``drop`` (the request is lost);
            ``lose`` (the request arrives, its response is lost); ``slow`` (status 503 after 3 seconds).
        after: number of requests forwarded before the fault.
        during: only requests whose path contains this text fail.
    """

    def __init__(self, upstreams):
        super().__init__()
        self.upstreams, self.fault, self.after, self.during = upstreams, None, 0, ""

    def answer(self, request, body):
        fault = self.fault if self.during in request.path else None
        if fault is not None and self.after > 0:
            self.after -= 1
            fault = None
        if isinstance(fault, int):
            request.reply(fault, b"no")
            return
        if fault == "slow":
            self.closing.wait(3)
            request.reply(503)
            return
        if fault in ("hang", "drop"):
            if fault == "hang":
                self.closing.wait()
            request.close_connection = True
            return
        prefix = next(prefix for prefix in self.upstreams if request.path.startswith(prefix))
        upstream = http.client.HTTPConnection(self.upstreams[prefix].removeprefix("http://"), timeout=60)
        kept = {n: v for n, v in request.headers.items() if n.lower() not in ("host", "transfer-encoding")}
        path = "/" + request.path.removeprefix(prefix).lstrip("/")
        upstream.request(request.command, path, body, kept | {"Content-Length": str(len(body))})
        answered = upstream.getresponse()
        content = answered.read()
        if fault == "lose":
            request.close_connection = True
            return
        dropped = {"transfer-encoding", "connection"} | ({"content-length"} if request.command != "HEAD" else set())
        request.reply(answered.status, content, [h for h in answered.getheaders() if h[0].lower() not in dropped])


class Files(Loopback):
    """Server of files with basic authentication, as a DVC HTTP remote."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def answer(self, request, body):
        wanted = "Basic " + base64.b64encode(f"{TOKEN}:{TOKEN}".encode()).decode()
        if request.headers.get("Authorization") != wanted:
            request.reply(401)
            return
        path = self.folder / request.path.strip("/")
        if request.command in ("PUT", "POST"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            request.reply(201)
        elif path.is_file():
            request.reply(200, path.read_bytes())
        else:
            request.reply(404)


@contextlib.contextmanager
def served_model(folder):
    """Serve a small random model from ``folder``. Yield the process and its port; the log is server.log."""
    from helpers.models import export_small
    from minigpt.generation.package import package

    package(export_small(folder / "gpt"), folder / "model")
    port = free_port()
    program = [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder / "model", "--env-manager", "local"]
    environment = os.environ | {"PATH": search_path()}  # MLflow starts uvicorn
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([*program, "-p", str(port)], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            while not answers(f"http://127.0.0.1:{port}/ping"):
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield process, port
        finally:
            process.kill()  # the worker gets SIGTERM then
            process.wait()
