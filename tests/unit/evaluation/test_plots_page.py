import json
import re
import shutil
import subprocess

import pytest
import vl_convert
from helpers.workspace import command, make_repository

from minigpt.errors import UserError
from minigpt.evaluation.charts import VEGA_LITE
from minigpt.evaluation.plots_page import write_page


@pytest.fixture
def repository(tmp_path, project_files):
    """Make a repository with the results of a small evaluation, as the stages write them."""
    folder = make_repository(tmp_path / "work", project_files)
    for name, text in {
        "results/train/history.csv": "step,train_loss,val_loss\n0,4.1,4.2\n5,3.0,2.5\n10,2.0,2.75\n",
        "results/train/batches.csv": "step,batch_loss\n1,4.0\n6,3.0\n10,2.5\n",
        "results/evaluate/baselines.csv": "model,loss\nthis model,2.5\nuniform,4.2\n",
        "results/evaluate/calibration.csv": "predicted,observed,count\n0.1,0.2,7\n0.5,0.4,9\n",
        "results/evaluate/context.csv": "position,loss,standard_error,count\n1,3.5,0.1,9\n2,2.5,0.1,9\n",
        "results/evaluate/characters.csv": "character,code_point,count,loss,share\nक,U+0915,90,2.5,1.0\n",
        "results/evaluate/confusions.csv": 'pair,target,guess,count,share\n", → क",",",क,12,0.75\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def shown(folder):
    ran = command("dvc", "plots", "show", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return (folder / "dvc_plots/index.html").read_text(encoding="utf-8")


def test_page_needs_no_network(repository, monkeypatch):
    fetched = re.compile(r'(src|href)="https?://')
    assert fetched.search(shown(repository))  # DVC's default page
    monkeypatch.chdir(repository)
    write_page()
    page = shown(repository)
    assert not fetched.search(page)
    assert "window.vegaEmbed" in page
    assert page.count("vegaEmbed('#") == 6
    status = subprocess.run(["git", "status", "--short"], cwd=repository, capture_output=True, text=True, check=True)
    assert "plots" not in status.stdout
    assert "config" not in status.stdout


def test_page_outside_a_repository_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run this from the root"):
        write_page()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_browser_without_a_network_draws_every_chart(repository, monkeypatch):
    monkeypatch.chdir(repository)
    write_page()
    shown(repository)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    page = (repository / "dvc_plots/index.html").as_uri()
    dumped = command("chromium", *options, "--virtual-time-budget=10000", "--dump-dom", page, cwd=repository).stdout
    assert len(re.findall(r'<svg [^>]*class="marks"', dumped)) == 6
    for text in ("best: 2.5000 at step 5", "this model", ", → क", ">क<", "probability of the most likely character"):
        assert text in dumped, text


def test_charts_of_dvc_show_the_results(repository):
    ran = command("dvc", "plots", "show", "--json", cwd=repository)
    plots = {name: one["content"] for name, (one,) in json.loads(ran.stdout)["data"].items()}
    assert set(plots) == {"loss", "baselines", "calibration", "positions", "characters", "confusions"}
    drawn = {name: vl_convert.vegalite_to_svg(content, vl_version=VEGA_LITE) for name, content in plots.items()}
    assert "best: 2.5000 at step 5" in drawn["loss"]
    assert "this model" in drawn["baselines"]
    assert ", → क" in drawn["confusions"]
    assert ">क<" in drawn["characters"]
