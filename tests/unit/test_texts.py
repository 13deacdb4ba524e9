"""Tests of fetching a text: from a DVC remote, from its address, and from neither."""

import hashlib
import subprocess

import pytest
import yaml
from helpers.servers import Loopback
from helpers.workspace import ROOT, command, python

from minigpt.errors import UserError
from minigpt.git import is_untracked
from minigpt.texts import fetch

TEXT = b"To be, or not to be\n"


class Publisher(Loopback):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def answer(self, request, body):
        request.reply(200, self.data) if request.path == "/text.txt" else request.reply(404, b"no")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A DVC repository without a remote, and with a folder for a text that is missing."""
    folder = tmp_path / "work"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert command("dvc", "init", "--quiet", cwd=folder).returncode == 0
    return folder


def track(folder, url):
    digest = hashlib.md5(TEXT).hexdigest()
    record = {"meta": {"url": url}, "outs": [{"md5": digest, "size": len(TEXT), "hash": "md5", "path": "text.txt"}]}
    (folder / "data/text.txt.yaml").write_text(yaml.safe_dump(record))
    return digest


def test_text_comes_from_its_address_and_can_be_pushed_and_pulled(repository, tmp_path):
    with Publisher(TEXT) as publisher:
        digest = track(repository, f"{publisher.url}/text.txt")
        described = (repository / "data/text.txt.yaml").read_bytes()
        fetch(repository / "data/text.txt")
        assert (repository / "data/text.txt").read_bytes() == TEXT
        assert (repository / "data/text.txt.dvc").read_bytes() == described
        requests = len(publisher.requests)
        remote = tmp_path / "remote"
        assert command("dvc", "remote", "add", "--default", "storage", remote, cwd=repository).returncode == 0
        assert command("dvc", "push", cwd=repository).returncode == 0
        assert (remote / "files/md5" / digest[:2] / digest[2:]).read_bytes() == TEXT
        subprocess.run(["rm", "-rf", ".dvc/cache", "data/text.txt"], check=True)
        fetch(repository / "data/text.txt")
        assert (repository / "data/text.txt").read_bytes() == TEXT
        assert len(publisher.requests) == requests


@pytest.mark.parametrize("data, tracked", [(TEXT, True), (b"another text", False)])
def test_text_that_was_saved_by_hand_is_tracked_if_it_is_the_one(repository, data, tracked):
    track(repository, "none")
    (repository / "data/text.txt").write_bytes(data)
    fetch(repository / "data/text.txt")
    assert (repository / "data/text.txt").read_bytes() == data
    assert (repository / "data/text.txt.dvc").exists() == tracked
    staged = subprocess.run(["git", "diff", "--cached", "--name-only"], check=True, capture_output=True, text=True)
    assert ("data/text.txt.dvc" in staged.stdout) == tracked
    assert is_untracked("data/text.txt") != tracked


def test_folder_comes_from_a_remote(repository, tmp_path):
    (repository / "data/books").mkdir()
    (repository / "data/books/a.txt").write_bytes(TEXT)
    for arguments in (("remote", "add", "--default", "storage", tmp_path / "remote"), ("add", "data/books"), ("push",)):
        assert command("dvc", *arguments, cwd=repository).returncode == 0
    subprocess.run(["rm", "-rf", ".dvc/cache", "data/books"], check=True)
    fetch(repository / "data/books")
    assert (repository / "data/books/a.txt").read_bytes() == TEXT


@pytest.mark.parametrize("content", ["", "- 1", "outs: []", "outs:\n- path: x\n", "{", "meta: 1\nouts:\n- md5: 1\n"])
def test_damaged_description_is_one_sentence(repository, content):
    (repository / "data/text.txt.dvc").write_text(content)
    with pytest.raises(UserError, match=r"text\.txt\.dvc: not a file of `dvc add`; .*save the text as"):
        fetch(repository / "data/text.txt")


@pytest.mark.parametrize(
    "path, reason",
    [
        pytest.param("/missing.txt", r"cannot be read \(HTTP Error 404", marks=pytest.mark.slow),
        ("/text.txt", "has another text"),
    ],
)
def test_text_without_a_source_is_one_sentence_with_the_ways_out(repository, path, reason):
    with Publisher(b"another text") as publisher:
        track(repository, publisher.url + path)
        with pytest.raises(UserError, match=rf"text\.txt: DVC's remote does not have it.*({reason}).*dvc remote add"):
            fetch(repository / "data/text.txt")
    assert [path.name for path in (repository / "data").iterdir()] == ["text.txt.yaml"]


def test_text_of_the_user_and_untracked_texts_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "mine.txt.yaml").write_text("not read")
    fetch(tmp_path / "mine.txt")
    fetch(tmp_path / "missing.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_profile_without_its_text_leaves_params_as_they_are(workspace):
    record = workspace / "data/shakespeare.txt.yaml"
    record.write_text(record.read_text().replace("https://raw.githubusercontent.com", "http://127.0.0.1:9"))
    before = (workspace / "params.yaml").read_bytes()
    ran = python("-m", "minigpt", "profile", "shakespeare-cpu", "--force", cwd=workspace)
    assert ran.returncode == 1
    assert ran.stderr.startswith(
        "minigpt: data/shakespeare.txt: DVC's remote does not have it, and http://127.0.0.1:9/"
    )
    assert ran.stderr.count("\n") == 1
    assert (workspace / "params.yaml").read_bytes() == before


def test_fetching_is_a_program_too(tmp_path):
    ran = python("-m", "minigpt.texts", "missing.txt", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stderr) == (0, "")
