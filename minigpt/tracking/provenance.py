"""Origin of a run: its user, code and DVC experiment, as the tags that MLflow's pages read."""

import getpass
import os
import re
from pathlib import Path

from minigpt.files import workspace
from minigpt.git import git
from minigpt.tracking.masking import mask

COMMIT_TAG = "mlflow.source.git.commit"
SOURCE = "stages/train.py"  # the program of a run: the other stages only add to it
EXPERIMENT_VARIABLES = {"dvc.experiment": "DVC_EXP_NAME", "dvc.baseline": "DVC_EXP_BASELINE_REV"}


def provenance() -> dict[str, str]:
    """Return the tags of a training that starts now: user, source, git state and DVC experiment."""
    tags = {tag: os.environ[name] for tag, name in EXPERIMENT_VARIABLES.items() if os.environ.get(name)}
    tags |= {"mlflow.source.name": SOURCE, "mlflow.source.type": "LOCAL"}
    if user := git("config", "user.name", folder=workspace()) or system_user():
        tags["mlflow.user"] = user
    commit = git("rev-parse", "HEAD")
    if not commit:
        return tags | {"git": "none"}
    # dvc.lock is written between the stages of a pipeline.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    tags |= {COMMIT_TAG: commit, "mlflow.source.git.dirty": "true" if changed else "false"}
    if changed:
        tags["git.uncommitted"] = ", ".join(line[3:].strip('"') for line in changed.splitlines())
    # A queued experiment runs in a copy without branches and remotes.
    root = workspace()
    found = {"branch": branch(root), "repoURL": repository_url(root)}
    return tags | {f"mlflow.source.git.{name}": value for name, value in found.items() if value}


def branch(folder: Path) -> str:
    """Return the branch of a repository. During an experiment HEAD is detached: then, one with the same commit."""
    at_head = git("for-each-ref", "--points-at", "HEAD", "--format", "%(refname:short)", "refs/heads", folder=folder)
    return git("symbolic-ref", "--quiet", "--short", "HEAD", folder=folder) or at_head.partition("\n")[0]


def repository_url(folder: Path) -> str:
    """Return the address of git's remote `origin`, else of the first one, without user and password."""
    remotes = git("remote", folder=folder).split()
    name = "origin" if "origin" in remotes else next(iter(remotes), "")
    url = git("remote", "get-url", name, folder=folder) if name else ""
    return mask(re.sub("://[^/]*@", "://", url))


def system_user() -> str:
    """Return the name of the user who runs this program; empty for a user without a name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
