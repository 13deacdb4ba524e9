"""The notebooks run without errors, and the committed outputs are those of a complete run."""

import base64
import json
import os
import re

import nbformat
import pytest
from helpers.workspace import ROOT, make_repository, set_params
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name, folder):
    """Execute a notebook in ``folder``, in a process of its own, and return the text that it prints."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # On a busy machine, two threads wait for each other.
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    return printed(notebook)


def printed(notebook):
    return "".join(
        output["text"]
        for output in outputs(notebook)
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    """Return the size in bytes of each picture."""
    found = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [len(base64.b64decode(picture)) for picture in found]


def losses(text):
    return {name: float(loss) for name, loss in re.findall(r"^(.+): ([\d.]+) nats, like", text, re.MULTILINE)}


def number(pattern, text):
    """Return the number in the first group of a pattern."""
    return float(re.search(pattern, text)[1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_all_outputs_and_no_error(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    bad = [output for output in outputs(notebook) if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not bad
    assert len(pictures(notebook)) >= 6
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.count("**Exercise") == text.count("<details>") == text.count("</details>") >= 3


def test_committed_notebooks_are_small_and_name_no_folder_of_a_machine():
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    assert len(notebooks) == 2
    assert sum(size for notebook in notebooks for size in pictures(notebook)) < 1_000_000
    for notebook in notebooks:
        text = printed(notebook) + json.dumps(notebook.metadata) + "".join(cell.source for cell in notebook.cells)
        assert not re.search(r"/(home|root|tmp|work|Users|usr)/|[A-Z]:\\", text)
        assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.slow
def test_gpt_from_scratch_ends_with_the_logits_of_the_model():
    text = execute("gpt_from_scratch.ipynb", ROOT / "notebooks")
    found = losses(text)
    order = ["uniform", "characters", "pairs", "one attention head", "GPT"]
    assert [found[name] for name in order] == sorted((found[name] for name in order), reverse=True)
    assert found["learned pairs"] == pytest.approx(found["pairs"], abs=0.1)
    assert found["GPT"] < 1.65
    assert number(r"logits agree; the largest difference is (\S+)", text) < 1e-4
    committed = losses(printed(nbformat.read(ROOT / "notebooks" / "gpt_from_scratch.ipynb", as_version=4)))
    assert found == pytest.approx(committed, abs=0.05)


@pytest.mark.slow
def test_look_inside_trains_a_model_if_there_is_none_and_measures_the_same_loss(tmp_path, project_files):
    folder = make_repository(tmp_path / "work", project_files, {"data": {"source": "data/drama.txt"}})
    # The stage scores the whole validation split, without rounding to bfloat16.
    set_params(folder, {"train": {"eval_chars": 200_000, "dtype": "float32"}})
    text = execute("look_inside.ipynb", folder / "notebooks")
    assert "No model yet" in text
    trained = json.loads((folder / "results/train/metrics.json").read_text())["val_loss"]
    assert number(r"mean surprisal ([\d.]+)", text) == pytest.approx(trained, abs=1e-4)
    # The weights of the maps give the outputs of the attention layers, and the last lens is the model.
    assert number(r"largest error of a layer's output is (\S+)", text) < 1e-4
    assert number(r"after block 2: ([\d.]+)", text) == pytest.approx(trained, abs=0.01)
    assert number(r"on the validation text ([\d.]+)", text) == pytest.approx(trained, abs=1e-3)
