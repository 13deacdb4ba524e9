"""Fixtures shared by all tests."""

import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.servers import MLFLOW_2_7_1, TOKEN, environment, mlflow_server
from helpers.workspace import ROOT, make_workspace

from minigpt import cli, program

torch.set_num_threads(1)  # for tensors this small, more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background, and its children, ignore it


LONG_FILES = ["test_notebooks", "test_launcher", "test_fuzz", "test_torture", "test_page", "test_documentation"]
"""Files whose slow tests take minutes."""


def pytest_collection_modifyitems(items):
    """Start with the long files: one that starts last would keep one process busy and the other idle."""

    def rank(item):
        if "integration" not in item.path.parts:
            return len(LONG_FILES) + 1
        return LONG_FILES.index(item.path.stem) if item.path.stem in LONG_FILES else len(LONG_FILES)

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def compiled_decoders(tmp_path_factory):
    """Cache folder for compiled decoders, separate from the user's. All processes of pytest share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield


@pytest.fixture
def minigpt(monkeypatch, capsys):
    """Function that runs ``minigpt`` in this process. It returns the exit status and both printed texts."""

    def run(*arguments, stdin=b"", cwd=None):
        with monkeypatch.context() as patch:
            patch.setenv("MINIGPT_CPU", "off")
            patch.setenv("COLUMNS", "100")
            patch.setattr(sys, "argv", ["minigpt", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            if cwd:
                patch.chdir(cwd)
            status = 0
            try:
                program.report(cli.main)
            except SystemExit as stop:
                status = stop.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture(scope="session")
def project_files():
    """The files of the project as they are now, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name and name != "dvc.lock"]
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture
def workspace(tmp_path, project_files):
    """A copy of the project with small params."""
    return make_workspace(tmp_path / "work", project_files)


@pytest.fixture(scope="session")
def current_server(tmp_path_factory):
    """The address of a real MLflow server with basic authentication."""
    with mlflow_server(sys.executable, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="session")
def old_server(tmp_path_factory):
    with mlflow_server(environment(*MLFLOW_2_7_1), tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(params=["current_server", pytest.param("old_server", marks=pytest.mark.slow)])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", TOKEN)
