"""TODO."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from minigpt.errors import UserError
from minigpt.files import workspace

if TYPE_CHECKING:
    pass

DAGSHUB = "https://dagshub.com"
"""Where DagsHub is; DAGSHUB_CLIENT_HOST, the variable of DagsHub's own client, goes before."""

TROUBLES = {
    "Connection refused": "nothing listens there",
    "NameResolutionError": "no such host is known",
    "timed out": "no answer in time",
    "Connection aborted": "the connection broke off",
}
"""What is in the words of the HTTP library, and what it means."""

SECRETS = ("DAGSHUB_USER_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables of the environment whose values are never printed."""


def resolve_tracking_uri() -> str:
    """The tracking URI; credentials go to the environment that MLflow reads, never into the URI.

    Raises:
        UserError: DAGSHUB_REPO does not name a repository.
    """
    repo, token = os.environ.get("DAGSHUB_REPO"), os.environ.get("DAGSHUB_USER_TOKEN")
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _placed(_without_credentials(uri))
    if repo and token:
        os.environ |= {"MLFLOW_TRACKING_USERNAME": token, "MLFLOW_TRACKING_PASSWORD": token}
        return f"{dagshub_page(repo)}.mlflow"
    return local_store_uri()


def local_store_uri() -> str:
    """The tracking URI of the repository's own store."""
    return f"sqlite:///{workspace() / 'mlflow.db'}"


def dagshub_page(repo: str) -> str:
    """The address of a repository on DagsHub.

    Raises:
        UserError: ``repo`` is not of the form user/repo.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"DAGSHUB_REPO: expected user/repo, got {repo!r}")
    return f"{os.environ.get('DAGSHUB_CLIENT_HOST', DAGSHUB).rstrip('/')}/{repo}"


def _placed(uri: str) -> str:
    """``uri`` with a relative path taken from the main workspace: a copy of it would take the store along."""
    if match := re.fullmatch(r"(sqlite:///)([^/].*)", uri):
        return f"{match[1]}{workspace() / match[2]}"
    if uri.startswith("file:") and not uri.startswith("file:/"):
        uri = uri.removeprefix("file:")
    return str(workspace() / uri) if ":" not in uri and not uri.startswith("databricks") else uri


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.scheme.startswith("http") or "@" not in parts.netloc:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return os.environ["MLFLOW_TRACKING_URI"]


def reason(error: Exception) -> str:
    """What an error says, in a few words and without any secret."""
    text = str(error).strip() or type(error).__name__
    if found := re.search(r"error code (\d{3}) !=|too many (\d{3}) error|^(401|403)\b", text):
        status = next(filter(None, found.groups()))
        return f"it answers {status}" + (": the token or password is not right" if status in ("401", "403") else "")
    for sign, words in TROUBLES.items():
        if sign in text:
            return words
    line = text.splitlines()[0]
    for name in SECRETS:
        if value := os.environ.get(name):
            line = line.replace(value, f"${name}")
    return line[:300]
