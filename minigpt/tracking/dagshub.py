"""Connection of this repository to DagsHub.

    minigpt dagshub user/repo        or: make dagshub REPO=user/repo

DVC's remote becomes the storage that DagsHub gives every repository, in one of the two forms that DagsHub documents
(https://dagshub.com/docs/feature_guide/dagshub_storage/). The first is S3: the bucket ``dvc`` at ``<page>.s3`` with the
token as both keys. It needs dvc-s3, and a test file must be read back unchanged. Otherwise HTTP is used: ``<page>.dvc``
with the token as user and password. The token is stored only in ``.dvc/config.local``, which git ignores. Storage and
MLflow are first tested with real requests; if either refuses, nothing is changed.
"""

import getpass
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minigpt.errors import UserError
from minigpt.files import require_root
from minigpt.git import git
from minigpt.tracking.credentials import REMOTE, cached_token, dagshub_host, dagshub_page
from minigpt.tracking.journal import EXPERIMENT
from minigpt.tracking.masking import mask_stderr
from minigpt.tracking.store import Store, describe_error
from minigpt.tracking.uploader import TIMEOUT

SUMMARY = """
  tested      wrote to {storage}; found the experiments of {page}.mlflow
  set         .dvc/config: DVC's default remote is `{remote}` (commit this file)
              .dvc/config.local: the token, readable by you alone
              git's remote `{remote}`: {page}.git
  now         dvc push                       upload data and models; `dvc pull` downloads them
              dvc exp push {remote} NAME       upload an experiment with its data
              minigpt sync                   upload the earlier runs
  later       runs are uploaded while they train, from any shell in this folder;
              MINIGPT_TRACKING=local keeps them in mlflow.db
  pages       {page}
              {page}.mlflow
"""


def read_token() -> str:
    """Return the token from DAGSHUB_USER_TOKEN or from the cache of `dagshub login`, or ask for it in a terminal."""
    token = os.environ.get("DAGSHUB_USER_TOKEN") or cached_token(dagshub_host())
    if not token and sys.stdin.isatty():
        token = getpass.getpass("token (from your settings on DagsHub): ")
    if not token:
        raise UserError(
            "DAGSHUB_USER_TOKEN is not set; create a token in your settings on DagsHub, or use `dagshub login`"
        )
    return token


def connect(repo: str, token: str) -> None:
    """Test the storage and MLflow of ``user/repo`` on DagsHub, set the remotes of DVC and git, and print a summary."""
    page = dagshub_page(repo)
    mask_stderr()
    require_root()
    if subprocess.run(["git", "check-ignore", "--quiet", ".dvc/config.local"], check=False).returncode:
        raise UserError(".dvc/config.local: git would track the token in this file; add it to .dvc/.gitignore")
    os.environ |= {"DAGSHUB_USER_TOKEN": token, "MLFLOW_TRACKING_USERNAME": token, "MLFLOW_TRACKING_PASSWORD": token}
    public, private = choose_remote(page, token)
    try:
        Store(f"{page}.mlflow", TIMEOUT).experiment_id(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
    except Exception as error:
        raise UserError(f"{page}.mlflow: cannot open the experiment: {describe_error(error)}") from None

    write_config(public, private)
    # Later programs find the repository by this remote.
    action = "set-url" if REMOTE in git("remote").split() else "add"
    subprocess.run(["git", "remote", action, REMOTE, f"{page}.git"], check=True)
    print(SUMMARY.format(page=page, remote=REMOTE, storage=public.get("endpointurl", public["url"])))


def write_config(public: dict[str, str], private: dict[str, str]) -> None:
    """Make a remote with these settings DVC's default. Only the user can read the file with the private ones."""
    from dvc.config import Config

    local = Path(".dvc/config.local")
    os.close(os.open(local, os.O_WRONLY | os.O_CREAT, 0o600))
    local.chmod(0o600)  # before DVC writes the token: DVC keeps the permissions of an existing file
    config = Config(Path(".dvc").resolve())
    # The local half has all settings, because commits from before this one lack the shared half. The shared half is
    # not validated, because the local half may still have the settings of another form.
    for level, settings in (("repo", public), ("local", public | private)):
        with config.edit(level, validate=level == "local") as edited:
            edited["remote"][REMOTE] = settings
            edited["core"]["remote"] = REMOTE


def choose_remote(page: str, token: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the settings of a DVC remote that passed the test: the public ones, and those with the token."""
    if importlib.util.find_spec("dvc_s3"):
        public = {"url": "s3://dvc", "endpointurl": f"{page}.s3"}
        private = {"access_key_id": token, "secret_access_key": token}
        try:
            check_remote(public, private)
            return public, private
        except UserError as error:
            print(f"minigpt: {error}; trying HTTP", file=sys.stderr)
    public, private = {"url": f"{page}.dvc"}, {"auth": "basic", "user": token, "password": token}
    check_remote(public, private)
    return public, private


def check_remote(public: dict[str, str], private: dict[str, str]) -> None:
    """Write the empty file to the remote through DVC and read it back.

    S3 clients send checksums since 2025. Older stores refuse them or keep them as a part of the file
    (https://github.com/boto/boto3/issues/4392, 4435).
    """
    from dvc.repo import Repo

    try:
        # A separate name: under REMOTE, DVC would mix these settings with those of an earlier form.
        settings = {"remote": {f"{REMOTE}-test": public | private}}
        with Repo(config=settings) as repo, tempfile.NamedTemporaryFile() as empty:
            remote = repo.cloud.get_remote(f"{REMOTE}-test")
            # The path that DVC gives an empty file, so that the test leaves a valid object in the remote.
            path = remote.fs.join(remote.path, "files", "md5", "d4", "1d8cd98f00b204e9800998ecf8427e")
            remote.fs.put_file(empty.name, path)
            if remote.fs.fs.cat_file(path):
                remote.fs.fs.rm_file(path)
                raise UserError("the file that was read back differs from the one that was written")
    except Exception as error:
        address = public.get("endpointurl", public["url"])
        raise UserError(f"{address}: DVC cannot use this storage: {describe_error(error)}") from None
