"""Tests of masking: no encoding of a secret in messages, files, or the database."""

import base64
import html
import http.server
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from helpers.tracking import write_run
from helpers.workspace import ROOT, command, make_repository, python

from minigpt.errors import UserError
from minigpt.tracking import store
from minigpt.tracking.masking import mask
from minigpt.tracking.uploader import Uploader

SECRETS = ["s3cret/marker+42", 'pä&ss"w<ö>rd %41\\', "0123456789abcdef0123", "a@b:c/d@e"]


def encodings(value):
    """Return a value in every encoding in which a server or a library may print it."""
    data = value.encode()
    pairs = [prefix + data for prefix in (b"", b"u:", b"me:", b"user:")]
    return [
        value, quote(value), quote(value, safe=""), quote_plus(value), quote(value, safe="").lower(),
        quote(quote(value, safe=""), safe=""), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1],
        ascii(value)[1:-1], html.escape(value), data.hex(), data.hex().upper(),
        *(base64.b64encode(pair + after).decode() for pair in pairs for after in (b"", b"!", b":x")),
        *(base64.urlsafe_b64encode(pair).decode().rstrip("=") for pair in pairs),
        *(quote(base64.b64encode(pair).decode(), safe="") for pair in pairs),
        base64.b64encode(f"user:{value}".encode("latin-1")).decode(), base64.b64encode(data + b":" + data).decode(),
    ]  # fmt: skip


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "DAGSHUB_USER_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_value_is_masked_in_every_encoding(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for encoded in encodings(value):
        masked = mask(f"the server said [{encoded}] to us")
        assert masked == f"the server said [${name}] to us", encoded


def test_secrets_are_masked_by_their_position():
    for text, masked in [
        ("postgresql://me:pa/ss@db.example.com/runs", "postgresql://db.example.com/runs"),
        ("GET https://me:p?a#s@s/@host/x failed", "GET https://host/x failed"),
        ("https://token@host", "https://host"),
        ("Authorization: Basic bWU6c2VjcmV0", "Authorization: Basic ***"),
        ("{'Authorization': 'Bearer abc123def456'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization=abcdef", "authorization=***"),
        ("https://host/x?user=a&password=secret&b=c", "https://host/x?user=a&password=***&b=c"),
        ('{"access_key": "secret", "a": 1}', '{"access_key": "***", "a": 1}'),
    ]:
        assert mask(text) == masked


def test_other_text_is_unchanged(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abc")  # too short
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for text in (
        "HTTP status 401: wrong token or password", "sqlite:////home/me@work/mlflow.db", "abc is false",
        "loss 1.234, 5,678 characters/s", "http://127.0.0.1:5000/user/repo.mlflow", "Basic authentication is required",
        "DAGSHUB_USER_TOKEN is not set; create a token in your settings on DagsHub",
    ):  # fmt: skip
        assert mask(text) == text


@pytest.mark.parametrize(
    "uri", ["https://me:pa/ss@host/runs", "https://me:123/ss@host", "https://me:pa#ss@host", "http://[bad", "https://", "http://h:99999999"]
)  # fmt: skip
def test_address_that_is_no_address_is_rejected_without_its_password(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: .* is not the address of a server; write ") as failed:
        store.resolve_tracking_uri()
    assert "ss@" not in str(failed.value)
    assert "pa" not in str(failed.value).replace("password", "")


def test_database_address_is_shown_and_stored_without_its_password(here, monkeypatch):
    for password in ("pa/ss", "p@a/s@s", "pa ss", "pa:ss?#"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{password}@db.example.com/runs")
        uploader = Uploader(store.resolve_tracking_uri())
        assert uploader.display_uri == "postgresql://db.example.com/runs"
        assert password not in store.describe_error(ValueError(f"cannot reach {store.resolve_tracking_uri()}"))


@contextmanager
def echoing_server(value):
    """Run a server that answers every request with all encodings of a secret, and the request's own headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = " ".join([str(dict(self.headers)), *encodings(value)]).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("value", SECRETS[:2])
def test_command_prints_and_stores_no_secret_that_a_server_echoes(repository, value):
    write_run(steps=3)
    with echoing_server(value) as address:
        uri = f"http://user:{quote(value, safe='')}@{address}"
        code = "import sys; from minigpt.cli import run; sys.argv[1:] = ['sync']; run()"
        synced = python("-c", code, cwd=repository, MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(ROOT))
        crash = (
            "from minigpt import program; from minigpt.tracking.run import Tracker\n"
            "import logging, os, warnings\n"
            "def main():\n"
            "    tracker = Tracker('a' * 32); tracker.upload(); tracker.stage('evaluate', {}, {'loss': 1.0})\n"
            "    secret = os.environ['MLFLOW_TRACKING_PASSWORD']\n"
            "    logging.getLogger('mlflow').warning('logged %s', secret); warnings.warn(f'warned {secret}')\n"
            "    raise ValueError(f'no answer to {secret}')\n"
            "program.run(main)"
        )
        crashed = python("-c", crash, cwd=repository, MLFLOW_TRACKING_URI=uri, PYTHONPATH=str(ROOT))
    assert synced.returncode == crashed.returncode == 1
    assert "run aaaaaaaa was not sent to http://127.0.0.1" in synced.stderr
    assert "ValueError: no answer to $MLFLOW_TRACKING_PASSWORD" in crashed.stderr
    files = [path.read_text(errors="replace") for path in repository.rglob("*") if path.is_file()]
    for text in (synced.stdout, synced.stderr, crashed.stdout, crashed.stderr, *files):
        for encoded in encodings(value):
            assert encoded not in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token of DagsHub", "password in a database's address"])
def test_pipeline_prints_and_stores_no_secret(tmp_path, project_files, kind):
    """All stages and commands run with a credential, and a server echoes it in every encoding."""
    folder, value = make_repository(tmp_path / "work", project_files), "s3cret/marker+42"
    with echoing_server(value) as address:
        variables = {
            "token of DagsHub": {
                "DAGSHUB_CLIENT_HOST": f"http://{address}", "DAGSHUB_REPO": "user/repo", "DAGSHUB_USER_TOKEN": value
            },
            "password in a database's address": {"MLFLOW_TRACKING_URI": f"postgresql://me:{value}@{address}/runs"},
        }[kind]  # fmt: skip
        programs = [("dvc", "repro"), ("minigpt", "summary"), ("minigpt", "sync"), ("minigpt", "dagshub", "user/repo")]
        ran = [command(*program, cwd=folder, PYTHONPATH=str(folder), **variables) for program in programs]
    assert [each.returncode for each in ran] == [0, 0, 1, 1], [each.stderr for each in ran]
    assert "are not in" in ran[0].stderr
    texts = [text.encode() for each in ran for text in (each.stdout, each.stderr)]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != Path(__file__).name]
    assert {".journal", "results", ".git", ".dvc"} <= {path.relative_to(folder).parts[0] for path in files}
    for content in (*texts, *(path.read_bytes() for path in files)):
        for encoded in encodings(value):
            assert encoded.encode() not in content
