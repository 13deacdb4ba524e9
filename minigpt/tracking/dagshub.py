"""Connect this repository to DagsHub.

python -m minigpt.dagshub user/repo        or: make dagshub REPO=user/repo

DVC's remote becomes the storage that DagsHub gives every repository, in one of the two forms that DagsHub documents
(https://dagshub.com/docs/feature_guide/dagshub_storage/): S3, the bucket ``dvc`` at ``<page>.s3`` with the token as
both keys, where dvc-s3 is installed and what is written there comes back the same; else HTTP, ``<page>.dvc`` with the
token as user and password. The token comes from DAGSHUB_USER_TOKEN, or is asked for; it is kept in
``.dvc/config.local``, which git ignores, and nowhere else. Both ends are tried with real requests first:
where one refuses, nothing is changed.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minigpt.errors import UserError, run
from minigpt.tracking.journal import EXPERIMENT
from minigpt.tracking.store import dagshub_page, reason
from minigpt.tracking.uploader import Uploader

REMOTE = "dagshub"
"""What DVC and git call it."""

EMPTY = "files/md5/d4/1d8cd98f00b204e9800998ecf8427e"
"""Where DVC keeps the empty file: to write it tries a remote, and leaves nothing false there."""


def connect(repo: str, token: str) -> None:
    """Try both ends, set the DVC remote, and say what was done.

    Args:
        repo: user/repo.
        token: of a DagsHub user who may write to it.

    Raises:
        UserError: this is no DVC repository, git would track the token, or DagsHub refuses.
    """
    from dvc.config import Config

    page = dagshub_page(repo)
    if not Path(".dvc").is_dir():
        raise UserError(".dvc: no such folder; run this from the root of the repository")
    if subprocess.run(["git", "check-ignore", "--quiet", ".dvc/config.local"], check=False).returncode:
        raise UserError(".dvc/config.local: git would track it, and the token in it; add it to .dvc/.gitignore")
    os.environ |= {"DAGSHUB_USER_TOKEN": token, "MLFLOW_TRACKING_USERNAME": token, "MLFLOW_TRACKING_PASSWORD": token}
    public, private = choose_remote(page, token)
    try_mlflow(f"{page}.mlflow")

    config = Config(Path(".dvc").resolve())
    with config.edit("repo", validate=False) as shared:  # the other half may still be of another form
        shared["remote"][REMOTE] = public
        shared["core"]["remote"] = REMOTE
    with config.edit("local") as local:  # all of it: commits of before do not have the shared half
        local["remote"][REMOTE] = public | private
        local["core"]["remote"] = REMOTE
    os.chmod(".dvc/config.local", 0o600)
    git_remotes = subprocess.run(["git", "remote"], capture_output=True, text=True, check=True).stdout.split()
    if REMOTE not in git_remotes:
        subprocess.run(["git", "remote", "add", REMOTE, f"{page}.git"], check=True)
    print(f"""
  tried       wrote to {public.get("endpointurl", public["url"])}; found the experiments of {page}.mlflow
  set         .dvc/config: DVC's default remote is `{REMOTE}` (commit this file)
              .dvc/config.local: the token, for you alone
              git's remote `{REMOTE}`: {page}.git
  now         dvc push                       data and models go there; `dvc pull` brings them back
              dvc exp push {REMOTE} NAME       an experiment, with its data
              export DAGSHUB_REPO={repo} DAGSHUB_USER_TOKEN=...
                                             with these two set, runs go there too
              make sync                      also the runs that were made before
  pages       {page}
              {page}.mlflow
""")


def choose_remote(page: str, token: str) -> tuple[dict[str, str], dict[str, str]]:
    """DVC's settings of a remote that has been tried: those that everybody may read, and those with the token.

    Raises:
        UserError: neither form can be used.
    """
    if importlib.util.find_spec("dvc_s3"):
        public = {"url": "s3://dvc", "endpointurl": f"{page}.s3"}
        private = {"access_key_id": token, "secret_access_key": token}
        try:
            try_remote(public, private)
            return public, private
        except UserError as error:
            print(f"minigpt: {error}; HTTP is tried instead", file=sys.stderr)
    public, private = {"url": f"{page}.dvc"}, {"auth": "basic", "user": token, "password": token}
    try_remote(public, private)
    return public, private


def try_remote(public: dict[str, str], private: dict[str, str]) -> None:
    """Write the empty file to the remote and read it again, with DVC's own means.

    Clients of S3 send checksums since 2025 that older stores refuse, or keep as a part of the file
    (https://github.com/boto/boto3/issues/4392, 4435).

    Raises:
        UserError: the remote cannot be reached, refuses, or gives back another file.
    """
    from dvc.repo import Repo

    try:
        # Under a name of its own: under REMOTE, settings of an earlier form would be mixed with these.
        settings = {"remote": {f"{REMOTE}-tried": public | private}}
        with Repo(config=settings) as repo, tempfile.NamedTemporaryFile() as empty:
            there = repo.cloud.get_remote(f"{REMOTE}-tried")
            place = there.fs.join(there.path, *EMPTY.split("/"))
            there.fs.put_file(empty.name, place)
            if there.fs.fs.cat_file(place):
                there.fs.fs.rm_file(place)
                raise UserError("it gives back another file than it was sent")
    except Exception as error:
        where = public.get("endpointurl", public["url"])
        raise UserError(f"{where}: DVC cannot use it: {reason(error)}") from None


def try_mlflow(uri: str) -> None:
    """Look for the experiment that runs go to; where there is none, make it.

    Raises:
        UserError: the server cannot be reached, or refuses.
    """
    try:
        Uploader(uri).experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
    except Exception as error:
        raise UserError(f"{uri}: no experiments there: {reason(error)}") from None


def _main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m minigpt.dagshub user/repo")
    dagshub_page(sys.argv[1])
    token = os.environ.get("DAGSHUB_USER_TOKEN")
    if not token and sys.stdin.isatty():
        token = getpass.getpass("token (from your settings on DagsHub): ")
    if not token:
        raise UserError("DAGSHUB_USER_TOKEN is not set; DagsHub shows tokens in your settings there")
    connect(sys.argv[1], token)


if __name__ == "__main__":
    run(_main)
