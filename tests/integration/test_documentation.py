"""The documentation agrees with the code: error messages, environment variables, and the commands of its pages."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers.workspace import ROOT, SMALL, command, make_repository, overlay

from minigpt import __version__

SOURCES = sorted(path for folder in ("minigpt", "stages") for path in (ROOT / folder).rglob("*.py"))
INTERNAL = {"journal.py"}
"""Files with errors that only a caller in Python can cause."""


def plain(text):
    """Return a text without Markdown's code marks, with single spaces."""
    return " ".join(text.replace("`", "").split())


def pieces(node):
    """Yield the constant parts of a message."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if isinstance(node, ast.BinOp):
        yield from pieces(node.left)
        yield from pieces(node.right)
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from re.split(r"[;:(]", plain(part.value))


def messages():
    """Yield each place that raises a UserError, with the constant parts of its message."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "UserError" and node.args:
                found = [piece.strip(" .,'") for piece in pieces(node.args[0])]
                if any(len(piece) > 8 for piece in found) and path.name not in INTERNAL:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", [piece for piece in found if len(piece) > 8]


def test_troubleshooting_has_each_error_message():
    page = plain((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    found = list(messages())
    assert len(found) > 50
    assert not [place for place, parts in found if not any(part in page for part in parts)]


def test_page_of_environment_variables_has_those_that_the_code_reads():
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(MINIGPT_\w+|DAGSHUB_\w+|CXX)`", page))
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert documented == set(re.findall(r"\b(MINIGPT_[A-Z_]+|DAGSHUB_[A-Z_]+|CXX)\b", code))


def test_architecture_lists_every_module():
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Files")[2]
    listed = set(re.findall(r"(\w+)\.py\b", tree))
    assert {path.stem for path in SOURCES if not path.stem.startswith("__")} <= listed


def test_citation_and_changelog_have_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"\n## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[1] == __version__


def test_readme_fits_on_one_page():
    text = re.sub(r"```.*?```|\]\([^)]*\)", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(text.split()) <= 700


NOT_RUN = {
    "make ui": "is a server; tests/unit/tracking/test_ui.py starts it",
    "export DAGSHUB_": "needs an account; tests/unit/tracking/test_dagshub.py has a server",
    "make dagshub": "likewise",
    "make sync": "likewise",
}
"""Commands that the next test leaves out, with the reason."""


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_of_a_page_run_in_a_fresh_clone(page, tmp_path, project_files):
    """The commands are those of the page, in its order. Only params and the profile `default` are smaller."""
    folder = make_repository(tmp_path / "clone", project_files, {"data": {"source": "data/drama.txt"}})
    profile = folder / "configs/default.yaml"
    tree = yaml.safe_load(profile.read_text(encoding="utf-8"))
    profile.write_text(yaml.safe_dump(overlay(tree, SMALL)), encoding="utf-8")
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (folder / ".venv/installed").touch()  # `make` does not install again
    variables = {"PYTHONPATH": str(folder), "BROWSER": "true", "COLUMNS": "80"}
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 4
    for block in ["git branch -M main\ngit add --all\ngit commit --quiet --message start", *blocks]:
        lines = [line for line in block.splitlines() if not line.startswith(tuple(NOT_RUN))]
        ran = command("bash", "-euxo", "pipefail", "-c", "\n".join(lines), cwd=folder, **variables)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        assert "Traceback" not in ran.stderr
