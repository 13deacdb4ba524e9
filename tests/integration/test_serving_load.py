"""The served model under load: many clients, clients that vanish, connections that send nothing."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from helpers.servers import served_model

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
    """A served model: its process and its port."""
    with served_model(tmp_path) as running:
        yield running


def worker(process):
    """Return the process that answers requests, a child of `mlflow models serve`."""
    (child,) = psutil.Process(process.pid).children()
    return child


def body(prompts=1, **params):
    return {"dataframe_records": [{"prompt": "ab"}] * prompts, "params": params}


def ask(port, seed=1, **params):
    """Return the status of a request for a short text, and the seconds until its answer."""
    started = time.monotonic()
    asked = body(seed=seed, max_new_tokens=20, **params)
    answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=120)
    return answer.status_code, time.monotonic() - started


def abandon(port, content, declared=None):
    """Send a whole or a partial request, and return the connection."""
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {declared or len(data)}"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def end(server):
    """End a server with SIGTERM; return the seconds until its worker has ended."""
    process, _ = server
    answering, started = worker(process), time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    answering.wait(60)
    return time.monotonic() - started


def test_short_request_is_answered_under_load_and_sigterm_ends_the_server(server):
    _, port = server
    with ThreadPoolExecutor(200) as clients:
        answered = list(clients.map(lambda seed: ask(port, seed), range(200)))
    assert {status for status, _ in answered} == {200}

    half_open = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    half_open += [abandon(port, b'{"dataframe', declared=1000) for _ in range(100)]
    for _ in range(100):
        half_open.append(socket.create_connection(("127.0.0.1", port)))
        half_open[-1].sendall(b"POST /invocations HTTP/1.1\r\nHost:")
    heavy = body(max_new_tokens=90_000, stop=["a" * 999 + "b"] * 100, overflow="slide")
    heavies = [abandon(port, heavy) for _ in range(50)]
    time.sleep(3)
    for connection in heavies[25:]:  # the others stay connected
        connection.close()
    status, seconds = ask(port)
    assert status == 200
    assert seconds < 5
    assert end(server) < 10


def test_work_of_a_request_is_bounded(server):
    _, port = server
    for content in (
        body(prompts=2000, max_new_tokens=100_000),
        body(prompts=2000),
        {"dataframe_records": [{"prompt": "ab" * 100_000}]},
    ):
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=content, timeout=60)
        assert answer.status_code == 400
        assert "a request can have 100,000 characters, but " in answer.json()["message"][-200:]


def test_requests_that_wait_are_ended_by_sigterm(server):
    _, port = server
    answered = []

    def wait():
        content = body(max_new_tokens=90_000, overflow="slide")
        answered.append(requests.post(f"http://127.0.0.1:{port}/invocations", json=content, timeout=60))

    clients = [threading.Thread(target=wait) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(2)
    assert end(server) < 10
    for client in clients:
        client.join()
    assert [answer.status_code for answer in answered] == [503] * 3
    assert all("the server is stopping" in answer.text for answer in answered)
