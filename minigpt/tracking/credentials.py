"""The repository on DagsHub that runs go to, and the token for it. Neither is ever stored by this module.

A shell needs no variables: `minigpt dagshub` set git's remote ``dagshub``, and the token is found where it or
`dagshub login` stored it.
"""

import configparser
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from minigpt.errors import UserError
from minigpt.files import workspace
from minigpt.git import git
from minigpt.tracking.masking import mask

REMOTE = "dagshub"  # in DVC and git
DEFAULT_HOST = "https://dagshub.com"


def dagshub_page(repo: str, name: str = "DAGSHUB_REPO") -> str:
    """Return the address of ``user/repo`` on DagsHub. The UserError for another value calls it ``name``."""
    if not re.fullmatch(r"(?a:\w[\w.-]*/[\w.-]*\w[\w.-]*)", repo):
        raise UserError(f"{name}: expected user/repo, got {mask(repr(repo))}")
    return f"{dagshub_host()}/{repo}"


def dagshub_host() -> str:
    """Return the address of DagsHub, or that in DAGSHUB_CLIENT_HOST, a variable of DagsHub's own client."""
    host = (os.environ.get("DAGSHUB_CLIENT_HOST") or DEFAULT_HOST).rstrip("/")
    if not re.fullmatch(r"https?://[^\s@]+", host):  # the address is stored in files that git tracks
        raise UserError(f"DAGSHUB_CLIENT_HOST: expected https://host without user and password, got {mask(host)}")
    return host


def configured_page() -> str:
    """Return the page of the repository in DAGSHUB_REPO, else in git's remote ``dagshub``; empty without both."""
    if repo := os.environ.get("DAGSHUB_REPO"):
        return dagshub_page(repo)
    url = git("remote", "get-url", REMOTE, folder=workspace())
    remote = re.fullmatch(r"(https?://[^\s@]+/[\w.-]+/[\w.-]+?)(\.git)?/?", url)
    return remote[1] if remote else ""


def find_token(page: str) -> str:
    """Return the token for a page on DagsHub; empty if there is none.

    It comes from DAGSHUB_USER_TOKEN, from the cache of `dagshub login`, or from the settings of DVC's remote. Another
    server never gets the token.
    """
    parts = urlsplit(page)
    host = f"{parts.scheme}://{parts.netloc}"
    variable = os.environ.get("DAGSHUB_USER_TOKEN", "") if host == dagshub_host() else ""
    return variable or cached_token(host) or _token_of_dvc(page)


def cached_token(host: str) -> str:
    """Return the first token for a host that is not expired in the cache of DagsHub's client; empty without one.

    The format is that of dagshub 0.6 (dagshub/auth/tokens.py): a YAML file with a list of tokens for each host. Tokens
    without an end are preferred, as there.
    """
    path = Path(os.environ.get("DAGSHUB_CLIENT_TOKENS_CACHE") or _default_cache())
    try:
        cache = yaml.safe_load(path.read_text(encoding="utf-8"))
        tokens = [token for token in cache[host] if not _is_expired(token)]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no file, another format, no such host
        return ""
    tokens.sort(key=lambda token: token.get("token_type") != "app-token")
    return str(tokens[0].get("access_token", "")) if tokens else ""


def _is_expired(token: dict[str, Any]) -> bool:
    expiry = str(token.get("expiry", ""))
    if expiry == "never" or token.get("token_type") == "app-token":
        return False
    try:  # in UTC, with up to nine digits after the seconds
        end = datetime.strptime(expiry[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    except ValueError:
        return True
    return end < datetime.now(timezone.utc)


def _default_cache() -> Path:
    """Return the path of DagsHub's cache, as the package appdirs finds it."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "dagshub/dagshub/Cache/tokens"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/dagshub/tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dagshub/tokens"


def _token_of_dvc(page: str) -> str:
    """Return the token that `minigpt dagshub` stored for DVC's remote, if that is on the same page."""
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read(workspace() / ".dvc" / "config.local", encoding="utf-8")
        remote = config[f"'remote \"{REMOTE}\"'"]
    except (configparser.Error, UnicodeDecodeError, KeyError):
        return ""
    if remote.get("endpointurl", remote.get("url", "")) not in (f"{page}.s3", f"{page}.dvc"):
        return ""
    return remote.get("password") or remote.get("secret_access_key") or ""
