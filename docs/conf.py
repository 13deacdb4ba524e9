"""Configuration of Sphinx for `make docs`: the Markdown of the repository, and the docstrings of the code, as a site.

The source folder is the root of the repository, so a link works on the site as it does in the files. The site is built
without a network. A broken link, an unknown name or an undocumented public object fails the build.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow.pyfunc  # noqa: F401 - before autodoc sets TYPE_CHECKING, with which FastAPI cannot be imported
from sphinx.ext.napoleon import Config, GoogleDocstring

from minigpt import __version__, params

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
HOME = "docs/README"
"""First page; the sidebar has the pages that it links, under the same headings."""

project = "minigpt"
author = "The minigpt authors"
project_copyright = f"2026, {author}"
release = __version__
root_doc = HOME
include_patterns = ["*.md", "docs/**.md", "benchmarks/README.md", "data/README.md", "tests/README.md"]
exclude_patterns = [".github", ".venv"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.coverage"]

html_theme = "furo"
html_title = f"minigpt {release}"
html_show_sourcelink = False
html_copy_source = False
templates_path: list[str] = []

myst_heading_anchors = 4

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
coverage_show_missing_items = True
coverage_statistics_to_stdout = False
coverage_modules = ["minigpt", "stages"]
coverage_ignore_modules = [r"minigpt\.__main__"]

nitpicky = True
nitpick_ignore_regex = [  # names of other packages, and parts of annotations
    (r"py:.*", r"(annotated_types|click|collections|contextlib|io|mlflow|numpy|pandas|pathlib|pydantic)\..+"),
    (r"py:.*", r"(socket|subprocess|torch)\..+"),
    (
        r"py:class",
        r"NoneType|NDArray|Future|np\.float64|Optimizer|optional|Tensor|FieldInfo|MinLen|MaxLen|_PydanticGeneralMetadata|Path|Run|Rows|[\d.e-]+",
    ),
    (r"py:.*", r"MlflowClient|MlflowException|list\[dict\[str"),
    (r"py:class", r"minigpt\.[\w.]+\.(T|SectionT|_\w+)"),
]


def write_api_pages(_app: "Sphinx") -> None:
    """Write a page of the API reference for each part of the code to ``docs/api``."""
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    pages: dict[str, list[str]] = {}
    for path in sorted([*(ROOT / "minigpt").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        package = ".".join(parts[:2] if len(parts) > 2 else parts[:1])
        pages.setdefault(package, []).append(".".join(part for part in parts if part != "__init__"))
    for package, modules in pages.items():
        text = f"# {package}\n"
        for module in modules:
            heading = "" if module == package else f"\n## {module}\n"
            text += f"{heading}\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"
        (folder / f"{package}.md").write_text(text, encoding="utf-8")


def parse_docstring(_app: "Sphinx", what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Turn the sections of a docstring in Google's style into fields. Those of values have colons, but no sections."""
    if what not in ("data", "attribute"):
        lines[:] = GoogleDocstring("\n".join(lines), Config()).lines()


def extend_page(_app: "Sphinx", name: str, content: list[str]) -> None:
    """Add the sidebar to the first page, and the table of all params to the page of params."""
    if name == HOME:
        content[0] += sidebar(content[0])
    elif name == "docs/params":
        content[0] += param_tables()


def sidebar(text: str) -> str:
    """Return the hidden tables of contents with the pages that ``text`` links under each of its headings."""
    tree = ""
    for heading, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE):
        pages = "\n".join(dict.fromkeys(re.findall(r"\]\(([\w./-]+\.md)\)", body)))
        tree += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{pages}\n```\n"
    api = "\n".join(f"api/{path.name}" for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    return f"{tree}\n```{{toctree}}\n:hidden:\n:caption: API reference\n\n{api}\n```\n"


def param_tables() -> str:
    """Return a table for each section of ``params.yaml``: key, default, valid values, and the comment in the file."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    tables = "\n## All params\n"
    for name, body in re.findall(r"^(\w+):\n((?:  .*\n)+)", text, re.MULTILINE):
        fields = params.Params.model_fields[name].annotation.model_json_schema()["properties"]
        tables += f"\n### {name}\n\n| key | default | type and limits | meaning |\n| --- | --- | --- | --- |\n"
        for key, value, comment in re.findall(r"^  (\w+): (.*?)\s+# (.*)$", body, re.MULTILINE):
            cells = [f"`{key}`", f"`{value}`", describe_type(fields[key]), comment]
            tables += "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
    return tables


def describe_type(schema: dict) -> str:
    """Return the type and the limits of a param from its JSON schema."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "below"}
    words = [f"{word} {schema[key]:,}".removesuffix(".0") for key, word in limits.items() if key in schema]
    return ", ".join([schema["type"], *words])


def setup(app: "Sphinx") -> None:
    """Connect the functions above to Sphinx."""
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", extend_page)
    app.connect("autodoc-process-docstring", parse_docstring)
