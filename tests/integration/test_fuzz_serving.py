"""Damaged and odd requests to a served model: each is answered, or refused with a reason, and the server stays up."""

import contextlib
import http.client
import json

import pytest
from helpers.fuzzing import ODD_TEXTS, WALL_SECONDS, changed_json, fuzz
from helpers.servers import served_model
from hypothesis import strategies as st

from minigpt.params import SamplingParams

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The port of a served model, and the log of the server."""
    folder = tmp_path_factory.mktemp("server")
    with served_model(folder) as (_, port):
        yield port, folder / "server.log"


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
