"""Copies of the project with small params, and commands that run in them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import yaml

from minigpt.params import Params, load

ROOT = Path(__file__).parents[2]
SHAKESPEARE = next(
    (
        path
        for path in (ROOT / "data/shakespeare.txt", ROOT.parent / "shared/data/tinyshakespeare.txt")
        if path.exists()
    ),
    None,
)
FULL = os.environ.get("TORTURE") == "full"
"""Whether fault tests try all variants, as `make torture` does, or those that differ most."""

SMALL = {
    "model": {"n_layer": 2, "n_head": 2, "head_size": 8, "n_embd": 20, "block_size": 16},
    "train": {
        "max_iters": 12,
        "batch_size": 4,
        "eval_interval": 5,
        "eval_chars": 2000,
        "sample_chars": 20,
        "device": "cpu",
    },
    "sample": {"max_new_tokens": 40},
}
"""Changes to params.yaml for a model that trains in a second."""


def overlay(tree, changes):
    """Return a copy of ``tree`` with the values of ``changes`` in its sections."""
    result = copy.deepcopy(tree)
    for section, values in changes.items():
        result[section] |= values
    return result


def params_with(**sections) -> Params:
    """Return the shipped params with SMALL and other changes."""
    tree = overlay(load(ROOT / "params.yaml").model_dump(), SMALL)
    return Params.model_validate(overlay(tree, sections))


def python(*arguments, cwd, **variables):
    """Run Python as :func:`command` does."""
    return command(sys.executable, *arguments, cwd=cwd, **variables)


def search_path():
    """Return the PATH with which a program finds the environment of the tests first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def command(*arguments, cwd, **variables):
    """Run a program with one thread, the interpreter of the tests first in PATH, and no tracking variables."""
    dropped = ("MLFLOW_", "DAGSHUB_", "DVC_", "MINIGPT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment |= {"PATH": search_path(), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def make_workspace(folder, project_files):
    """Copy the project to ``folder``, with SMALL params and the songs as the text."""
    for name in project_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    set_params(folder, {"data": {"source": "data/songs.txt"}}, SMALL)
    return folder


def make_repository(folder, project_files, *changes):
    """Make a workspace that is a git repository, with changed params, and commit all files."""
    make_workspace(folder, project_files)
    set_params(folder, *changes)
    for arguments in (
        ("init", "--quiet"),
        ("config", "user.name", "test"),
        ("config", "user.email", "test@example.com"),
        ("add", "--all"),
        ("commit", "--quiet", "--message", "start"),
    ):
        ran = command("git", *arguments, cwd=folder)
        assert ran.returncode == 0, ran.stderr
    return folder


def set_params(folder, *changes):
    """Change params.yaml in ``folder``."""
    path = folder / "params.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for change in changes:
        tree = overlay(tree, change)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
