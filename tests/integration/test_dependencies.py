"""The train stage and the checkpoint fingerprint depend on exactly the files that training imports."""

import ast
import json
import shutil

import pytest
import yaml
from helpers.workspace import ROOT, command, make_repository, python

ENTRY_POINTS = ("minigpt/training", "minigpt/evaluation/loss.py", "minigpt/export.py")
EDIT_EACH_FILE = """
import json
from pathlib import Path
from minigpt.params import load
from minigpt.training.checkpoint import fingerprint

params, changed = load(Path("params.yaml")), []
before = fingerprint(params, "digest")
for file in sorted(Path("minigpt").rglob("*.py")):
    source = file.read_bytes()
    file.write_bytes(source + b"# edited")
    if fingerprint(params, "digest") != before:
        changed.append(file.as_posix())
    file.write_bytes(source)
print(json.dumps(changed))
"""


def python_files(path):
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def has_code(file):
    """Return whether a file has more than a docstring and a version number."""
    statements = ast.parse(file.read_text()).body
    return any(not isinstance(node, ast.Expr) and "__version__" not in ast.unparse(node) for node in statements)


def imports_of(file):
    """Yield the files of the library that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] == "minigpt":
                module = ROOT.joinpath(*name.split("."))
                yield from (file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file())


def imported_by_training():
    """Return the files that training imports, directly or not, relative to the root of the project."""
    found, queue = set(), [file for entry in ENTRY_POINTS for file in python_files(ROOT / entry)]
    while queue:
        if (file := queue.pop()) not in found:
            found.add(file)
            queue += imports_of(file)
    return {file.relative_to(ROOT).as_posix() for file in found if has_code(file)}


IMPORTED = imported_by_training()
"""Files that training imports. A file with no more than a docstring and a version number does not count."""

LIBRARY = {file.relative_to(ROOT).as_posix() for file in python_files(ROOT / "minigpt") if has_code(file)}


def test_training_imports_a_part_of_the_library():
    assert {"minigpt/training/control.py", "minigpt/choices.py", "minigpt/runtime/cpu.py"} < IMPORTED < LIBRARY
    assert "minigpt/tracking/run.py" in LIBRARY - IMPORTED


def test_train_stage_depends_on_imported_files_alone():
    dependencies = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["deps"]
    covered = {
        file.relative_to(ROOT).as_posix()
        for dependency in dependencies
        if dependency.startswith("minigpt/")
        for file in python_files(ROOT / dependency)
        if has_code(file)
    }
    assert covered == IMPORTED


def test_fingerprint_covers_imported_files_alone(tmp_path):
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    ran = python("-c", EDIT_EACH_FILE, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) & LIBRARY == IMPORTED


@pytest.fixture(scope="module")
def trained_repository(tmp_path_factory, project_files):
    repository = make_repository(tmp_path_factory.mktemp("dependencies") / "repository", project_files)
    ran = command("dvc", "repro", "train", cwd=repository)
    assert ran.returncode == 0, ran.stderr
    return repository


@pytest.mark.parametrize(
    "name", ["minigpt/choices.py", "minigpt/training/control.py", "minigpt/runtime/launcher.py", "minigpt/cli.py"]
)
def test_dvc_status_reports_edits_of_imported_files_alone(trained_repository, name):
    file = trained_repository / name
    source = file.read_bytes()
    file.write_bytes(source + b"# edited\n")
    status = command("dvc", "status", "--json", "train", cwd=trained_repository)
    file.write_bytes(source)
    assert status.returncode == 0, status.stderr
    assert ("train" in json.loads(status.stdout)) == (name in IMPORTED)
