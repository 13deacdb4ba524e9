"""Imports between the parts of the library."""

import ast

import pytest
from helpers.imports import imports_of, python_files
from helpers.workspace import ROOT, python

BASE = {"params", "choices", "errors", "files"}
MODEL = {"model", "cache", "ops", "data", "runtime", *BASE}
EVALUATION = {"evaluation", "export", "quantize", *MODEL}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "git": set(),
    "choices": set(),
    "params": {"choices", "errors", "files"},
    "profiles": {"texts", "data", *BASE},
    "program": {"errors"},
    "texts": {"program", "errors", "files"},
    "runtime": {"errors", "files"},
    "data": {"runtime", *BASE},
    "ops": set(),
    "cache": {"ops", "params", "choices"},
    "model": {"cache", "ops", "params", "choices"},
    "quantize": MODEL,
    "export": MODEL,
    "tracking": {"runtime", "git", *BASE},
    "evaluation": EVALUATION,
    "generation": EVALUATION,
    "training": {"generation", *EVALUATION},
    "page": {"evaluation", "export", "quantize", *MODEL},
    "comparison": {"evaluation", "data", "page", "tracking", "git", *BASE},
    "summary": {"comparison", "evaluation", "tracking", "git", *BASE},
    "terminal": {"errors"},
    "cli": {
        "program",
        "terminal",
        "git",
        "profiles",
        "summary",
        "comparison",
        "page",
        "training",
        "generation",
        "tracking",
        *EVALUATION,
    },
    "__main__": {"cli"},
    "__init__": set(),
}
"""The parts that each part may import, in addition to its own files."""


def part_of(file):
    return file.relative_to(ROOT / "minigpt").with_suffix("").parts[0]


def test_table_names_all_parts():
    assert {part_of(file) for file in python_files("minigpt")} | {"cache"} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", python_files("minigpt"), ids=lambda file: str(file.relative_to(ROOT)))
def test_part_imports_only_parts_below(file):
    part = part_of(file)
    imported = {part_of(path) for path in imports_of(file)} - {part, "__init__"}
    assert imported <= MAY_IMPORT[part]


def test_table_has_no_cycle():
    above = {part: set(below) - {part} for part, below in MAY_IMPORT.items()}
    while leaves := {part for part, below in above.items() if not below & set(above)}:
        above = {part: below for part, below in above.items() if part not in leaves}
    assert not above


@pytest.mark.parametrize("part", ["data", "model.py", "ops.py", "training"])
def test_core_does_not_import_mlflow_or_dvc(part):
    for file in python_files(f"minigpt/{part}"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"mlflow", "dvc"}, file


def test_comparison_imports_neither_torch_nor_mlflow():
    code = "import sys, minigpt.comparison.tables; print(sorted({'torch', 'mlflow', 'dvc'} & set(sys.modules)))"
    assert python("-c", code, cwd=ROOT).stdout.strip() == "[]"


def test_stages_and_commands_start_without_torch_mlflow_and_dvc():
    modules = "stages.prepare, stages.train, stages.evaluate, stages.sample, minigpt.cli, minigpt.tracking"
    code = f"import sys, {modules}; print(sorted({{'torch', 'mlflow', 'dvc'}} & set(sys.modules)))"
    assert python("-c", code, cwd=ROOT).stdout.strip() == "[]"
