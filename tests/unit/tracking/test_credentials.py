"""Tests of the repository and the token for DagsHub."""

import subprocess

import pytest
import yaml

from minigpt.errors import UserError
from minigpt.tracking.credentials import cached_token, configured_page, find_token
from minigpt.tracking.dagshub import read_token, write_config
from minigpt.tracking.store import local_store_uri, resolve_tracking_uri

HOST = "https://dagshub.com"
PAGE = f"{HOST}/user/repo"
APP = {"access_token": "of-the-app", "expiry": "never", "token_type": "app-token"}
VALID = {"access_token": "still-valid", "expiry": "2999-01-01T00:00:00.000000Z", "token_type": "bearer"}
EXPIRED = {"access_token": "expired", "expiry": "2020-01-01T00:00:00.123456789Z", "token_type": "bearer"}


@pytest.fixture(autouse=True)
def cache(here, monkeypatch):
    """The path of an empty cache of DagsHub's client, in a git repository with the remote `dagshub`."""
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "remote", "add", "dagshub", f"{PAGE}.git"], check=True)
    monkeypatch.setenv("DAGSHUB_CLIENT_TOKENS_CACHE", str(here / "tokens"))
    return here / "tokens"


def write(cache, *tokens, host=HOST):
    cache.write_text(yaml.safe_dump({"version": "1", host: list(tokens)}))


@pytest.mark.parametrize(
    "tokens, found",
    [([EXPIRED], ""), ([EXPIRED, VALID], "still-valid"), ([VALID, APP], "of-the-app"), ([{"other": 1}], ""), ([], "")],
)
def test_cache_gives_the_best_token_that_is_not_expired(cache, tokens, found):
    write(cache, *tokens)
    assert cached_token(HOST) == found


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "{", "https://dagshub.com: 3", b"\xff\xfe"])
def test_cache_of_another_form_has_no_token(cache, content):
    if content is not None:
        cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cached_token(HOST) == ""


def test_token_comes_from_the_variable_then_the_cache_then_dvc(here, cache, monkeypatch):
    (here / ".dvc").mkdir()
    assert find_token(PAGE) == ""
    write_config({"url": f"{PAGE}.dvc"}, {"auth": "basic", "user": "of-dvc", "password": "of-dvc"})
    assert find_token(PAGE) == "of-dvc"
    write(cache, APP)
    assert find_token(PAGE) == "of-the-app"
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "of-the-variable")
    assert find_token(PAGE) == "of-the-variable"


def test_token_is_not_sent_to_another_server(here, cache, monkeypatch):
    (here / ".dvc").mkdir()
    write_config({"url": f"{PAGE}.dvc"}, {"auth": "basic", "user": "of-dvc", "password": "of-dvc"})
    write(cache, APP)
    monkeypatch.setenv("DAGSHUB_USER_TOKEN", "of-the-variable")
    assert find_token("https://elsewhere.example.com/user/repo") == ""


def test_s3_keys_are_the_token_too(here):
    (here / ".dvc").mkdir()
    keys = {"access_key_id": "of-dvc", "secret_access_key": "of-dvc"}
    write_config({"url": "s3://dvc", "endpointurl": f"{PAGE}.s3"}, keys)
    assert find_token(PAGE) == "of-dvc"


def test_runs_go_to_the_git_remote_unless_local_is_asked_for(cache, monkeypatch):
    assert resolve_tracking_uri() == local_store_uri()  # no token
    write(cache, APP)
    assert configured_page() == PAGE
    assert resolve_tracking_uri() == f"{PAGE}.mlflow"
    monkeypatch.setenv("DAGSHUB_REPO", "other/one")
    assert resolve_tracking_uri() == f"{HOST}/other/one.mlflow"
    monkeypatch.setenv("MINIGPT_TRACKING", "local")
    assert resolve_tracking_uri() == local_store_uri()
    monkeypatch.setenv("MINIGPT_TRACKING", "off")
    with pytest.raises(UserError, match="MINIGPT_TRACKING: expected 'local', got 'off'"):
        resolve_tracking_uri()


@pytest.mark.parametrize(
    "url", ["git@dagshub.com:user/repo.git", "https://me:secret@dagshub.com/user/repo.git", "/a/b"]
)
def test_remote_of_another_form_is_not_a_page(url):
    subprocess.run(["git", "remote", "set-url", "dagshub", url], check=True)
    assert configured_page() == ""


def test_connecting_uses_the_login(cache):
    write(cache, VALID)
    assert read_token() == "still-valid"
