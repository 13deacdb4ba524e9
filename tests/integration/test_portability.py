"""Systems without Unix's fcntl module, CPU affinity and Unix sockets, such as Windows."""

import ast

import pytest
from helpers.workspace import ROOT, python

SOURCES = sorted(path.relative_to(ROOT) for part in ("minigpt", "stages") for path in (ROOT / part).rglob("*.py"))

BLOCK = """
import os, psutil, socket, sys  # psutil for Linux needs sockets
del socket.AF_UNIX
sys.modules["fcntl"] = None  # any import of it raises ModuleNotFoundError
for name in ("sched_getaffinity", "sched_setaffinity"):
    if hasattr(os, name):
        delattr(os, name)
"""

IMPORT_ALL = """
import importlib
from pathlib import Path
for path in sys.argv[1:]:
    name = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
    print(name)
"""

RUN_STAGE = """
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def imported_modules(source):
    """Yield the modules that a file imports at any level, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_file_imports_fcntl():
    assert [path for path in SOURCES if "fcntl" in imported_modules((ROOT / path).read_text(encoding="utf-8"))] == []


def test_every_module_can_be_imported_without_fcntl(tmp_path):
    paths = [path for path in SOURCES if path.name != "__main__.py"]  # runs the command line
    ran = python("-c", BLOCK + IMPORT_ALL, *paths, cwd=ROOT, TMPDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(paths) > 30
    assert {f"stages.{name}" for name in ("prepare", "train", "evaluate", "sample")} <= set(ran.stdout.splitlines())


@pytest.mark.slow
def test_stages_run_without_fcntl(workspace, tmp_path):
    for stage in ("prepare", "train", "evaluate", "sample"):
        ran = python("-c", BLOCK + RUN_STAGE, f"stages.{stage}", cwd=workspace, TMPDIR=str(tmp_path))
        assert ran.returncode == 0, ran.stderr
    assert (workspace / "results/sample/samples.txt").stat().st_size > 0
