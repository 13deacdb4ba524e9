"""The notebooks run without errors, and the committed outputs are those of a complete run."""

import re

import nbformat
import pytest
from helpers.workspace import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name, folder):
    """Execute a notebook in ``folder``, in a process of its own, and return the text that it prints."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return printed(notebook)


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(
        output["text"] for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def losses(text):
    return {name: float(loss) for name, loss in re.findall(r"^(.+): ([\d.]+) nats, like", text, re.MULTILINE)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_all_outputs_and_no_error(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.count("**Exercise") == text.count("<details>") == text.count("</details>") >= 3


@pytest.mark.slow
def test_gpt_from_scratch_ends_with_the_logits_of_the_model():
    text = execute("gpt_from_scratch.ipynb", ROOT / "notebooks")
    found = losses(text)
    order = ["uniform", "characters", "pairs", "one attention head", "GPT"]
    assert [found[name] for name in order] == sorted((found[name] for name in order), reverse=True)
    assert found["learned pairs"] == pytest.approx(found["pairs"], abs=0.1)
    assert found["GPT"] < 1.65
    assert float(re.search(r"logits agree; the largest difference is (\S+)", text)[1]) < 1e-4
    committed = losses(printed(nbformat.read(ROOT / "notebooks" / "gpt_from_scratch.ipynb", as_version=4)))
    assert found == pytest.approx(committed, abs=0.05)
