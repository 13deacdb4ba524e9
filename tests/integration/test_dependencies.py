"""The train stage and the checkpoint fingerprint depend on exactly the files that training imports."""

import ast
import json
import shutil

import yaml
from helpers.imports import import_closure, python_files
from helpers.workspace import ROOT, python

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


def with_code(files):
    """Return the files with more than a docstring and a version number, relative to the root of the project."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if not all(
            isinstance(node, ast.Expr) or "__version__" in ast.unparse(node)
            for node in ast.parse(file.read_text()).body
        )
    }


IMPORTED = with_code(import_closure(*ENTRY_POINTS))
"""Files that training imports. A file with no more than a docstring and a version number does not count."""

LIBRARY = with_code(python_files("minigpt"))


def test_training_imports_a_part_of_the_library():
    assert {"minigpt/training/control.py", "minigpt/choices.py", "minigpt/runtime/cpu.py"} < IMPORTED < LIBRARY
    assert "minigpt/tracking/run.py" in LIBRARY - IMPORTED


def test_train_stage_depends_on_imported_files_alone():
    dependencies = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["deps"]
    library = [dependency for dependency in dependencies if dependency.startswith("minigpt/")]
    assert with_code(file for dependency in library for file in python_files(dependency)) == IMPORTED


def test_fingerprint_covers_imported_files_alone(tmp_path):
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    ran = python("-c", EDIT_EACH_FILE, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) & LIBRARY == IMPORTED
