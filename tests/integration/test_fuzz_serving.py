"""Damaged and odd requests to a served model: each is answered, or refused with a reason, and the server stays up."""

import contextlib
import http.client
import json
import subprocess
import sys
import time

import pytest
import torch
from helpers.fuzzing import ODD_TEXTS, WALL_SECONDS, changed_json, fuzz
from helpers.servers import answers, free_port
from helpers.workspace import params_with
from hypothesis import strategies as st

from minigpt import export
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import serving
from minigpt.model import GPT
from minigpt.params import SamplingParams

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a served model, and the log of the server."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    model = GPT(params_with(model={"init": "normal"}).model, 4)
    export.export(folder / "gpt", model.config, model.state_dict(), Tokenizer("\nabc"))
    serving.package(folder / "gpt", folder / "model")
    port = free_port()
    program = [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder / "model", "--env-manager", "local"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([*program, "-p", str(port)], cwd=folder, stdout=log, stderr=log)
        try:
            while not answers(f"http://127.0.0.1:{port}/ping"):
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield port, folder / "server.log"
        finally:
            process.terminate()
            process.wait()


def post(port, data, headers):
    """Return the status and the text of the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WALL_SECONDS)
    try:
        connection.putrequest("POST", "/invocations")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before the server has read all
            connection.send(data)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


REQUEST = {
    "dataframe_split": {"columns": ["prompt"], "data": [["ab"], ["c"]]},
    "params": SamplingParams(max_new_tokens=3, stop=["a"]).model_dump(),
}
RECORDS = {"dataframe_records": [{"prompt": "ab"}], "params": {"max_new_tokens": 3}}
types = st.sampled_from(
    ["application/json"] * 12
    + ["text/csv", "application/x-parquet", "application/json; charset=latin1", "a;b;c=", "", "x"]
)
csv = st.lists(st.sampled_from(["prompt", "a", "\n", ",", '"', "ab", *ODD_TEXTS]), max_size=6).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)


def test_any_request_is_answered_or_refused(server):
    port, log = server
    statuses = []

    def case(drawn):
        data, content_type = drawn
        status, text = post(port, data, {"Content-Type": content_type, "Content-Length": str(len(data))})
        statuses.append(status)
        assert status in (200, 400, 415), text
        if "json" in content_type:  # for other types, MLflow's own answers contain one
            assert "Traceback" not in text
        assert status == 200 or len(text) > 20

    fuzz(st.tuples(st.one_of(changed_json(REQUEST), changed_json(RECORDS), csv), types), case)
    assert statuses.count(200) > 20
    assert "Traceback" not in log.read_text()


def test_large_and_incomplete_requests_are_refused(server):
    port, _ = server
    json_type = {"Content-Type": "application/json"}
    status, text = post(port, b"[" * 1000, json_type | {"Content-Length": "100000000000"})
    assert (status, "a request can have 4,194,304 bytes" in text) == (400, True)
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    status, text = post(port, chunk * 8 + b"0\r\n\r\n", json_type | {"Transfer-Encoding": "chunked"})
    assert (status, "a request can have 4,194,304 bytes" in text) == (400, True)
    data = json.dumps(RECORDS).encode()
    status, text = post(port, data, {"Content-Length": str(len(data))})
    assert (status, "the header Content-Type is missing" in text) == (400, True)
    assert post(port, data, json_type | {"Content-Length": str(len(data))})[0] == 200
