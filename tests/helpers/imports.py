"""Imports between the files of the project, read from their source."""

import ast

from helpers.workspace import ROOT


def python_files(path):
    """Return the Python files at a path relative to the root of the project: one file, or all in a folder."""
    return sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]


def imports_of(file):
    """Yield the files of the library that a file imports, anywhere in it, except those for type checkers only."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("minigpt."):
                module = ROOT.joinpath(*name.split("."))
                yield from (path for path in (module.with_suffix(".py"), module / "__init__.py") if path.is_file())


def import_closure(*paths, without=()):
    """Return all files that the files at ``paths`` import, directly or not, and these files.

    Parts of the library, such as ``tracking`` or ``summary.py``, in ``without`` are not followed.
    """
    skipped = {file for part in without for file in python_files(f"minigpt/{part}")}
    found, queue = set(), [file for path in paths for file in python_files(path)]
    while queue:
        if (file := queue.pop()) not in found | skipped:
            found.add(file)
            queue += imports_of(file)
    return found
