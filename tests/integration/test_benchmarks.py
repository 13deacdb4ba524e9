import argparse
import json
from importlib.metadata import version

import pytest
import torch
from helpers.pictures import pixels, texts
from helpers.workspace import ROOT, python
from PIL import Image

from benchmarks import gpu, peers
from benchmarks.__main__ import draw, middle, rows
from benchmarks.budgets import PEERS
from benchmarks.contenders import MEASURES
from benchmarks.texts import WRITERS
from minigpt.evaluation.charts import COLORS


def test_every_measure_lists_this_project_first():
    assert all(next(iter(contenders)).startswith("minigpt") for contenders in MEASURES.values())


@pytest.mark.parametrize("unit, peer, ratio", [("characters per second", 50, "2"), ("seconds", 200, "2")])
def test_ratio_above_one_means_the_project_is_better(unit, peer, ratio):
    found = {"minigpt": middle([{"value": 100}, {"value": 90}, {"value": 500}]), "peer": middle([{"value": peer}])}
    (_, ours, one, _), (_, _, theirs, _) = rows(f"something, {unit}", found)
    assert (ours, one, theirs) == ("100", "1", ratio)


def test_missing_peer_is_reported():
    found = {"minigpt": middle([{"value": 1.0}]), "peer": middle([{"missing": "no such package"}])}
    assert rows("something, seconds", found)[1][-1] == "not measured: no such package"


@pytest.mark.slow
def test_budgets_write_a_curve_of_each_contender(tmp_path):
    arguments = ["shakespeare-quick", "--seeds", "2", "--peer-seconds", "1", "--held-out", "start"]
    ran = python("-m", "benchmarks.budgets", *arguments, "--text", "data/songs.txt", "--results", tmp_path, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    runs = json.loads(next(tmp_path.glob("*.json")).read_text())["runs"]
    seeds = {"shakespeare-quick": 2} | dict.fromkeys(PEERS.values(), 1)
    assert {name: len(found) for name, found in runs.items()} == seeds
    for run in (run for found in runs.values() for run in found):
        seconds, losses = zip(*run["curve"], strict=True)
        assert seconds == tuple(sorted(seconds)) and run["seconds"] == seconds[-1] > 0
        assert run["loss"] == min(losses) < 4
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000


@pytest.mark.slow
def test_peer_that_is_not_installed_does_not_lose_the_results(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')")
    arguments = ["shakespeare-quick", "--seeds", "1", "--peers", "hf", "--text", "data/songs.txt"]
    ran = python(
        "-m", "benchmarks.budgets", *arguments, "--results", tmp_path, cwd=ROOT, PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert ran.returncode == 0, ran.stderr
    assert "not measured: no transformers here" in ran.stdout
    assert list(json.loads(next(tmp_path.glob("*.json")).read_text())["runs"]) == ["shakespeare-quick"]


@pytest.mark.slow
def test_writing_in_a_page_is_measured():
    pytest.importorskip("playwright", reason="needs playwright")
    measure = next(name for name in MEASURES if name.startswith("writing in a page"))
    ran = python(
        "-m", "benchmarks.contenders", measure, "minigpt, default profile", "--text", "data/songs.txt", cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.get("missing") == "Chromium is not installed" or found["value"] > 1


@pytest.mark.slow
def test_benchmark_writes_its_results(tmp_path):
    arguments = ["--rounds", "2", "--megabytes", "1", "--text", "data/songs.txt", "--results", tmp_path]
    ran = python("-m", "benchmarks", "encoding", *arguments, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(written["measures"]) == {"encoding, MB per second"}
    for figures in written["measures"]["encoding, MB per second"].values():
        assert len(figures["values"]) == 2
        assert figures["megabytes"] == pytest.approx(1, rel=0.1)
    assert written["machine"]["torch"] == version("torch")
    picture = next(tmp_path.glob("*.png"))
    assert pixels(picture, COLORS[0]) > 1000
    with Image.open(picture) as image:
        assert image.width > 800


def test_picture_has_a_bar_and_a_ratio_per_peer(tmp_path):
    seconds = {"minigpt": 2.0, "a peer": 5.0, "a slow peer": 246.0}
    found = {name: middle([{"value": value}]) for name, value in seconds.items()}
    missing = {"not installed": middle([{"missing": "no such package"}])}
    results = {"machine": {"device": "a processor"}, "measures": {"something, seconds": found | missing}}
    draw(results, tmp_path / "bars.svg")
    shown = texts(tmp_path / "bars.svg")
    assert {"a processor", "times better than the peer", "2.5", "123"} <= set(shown)
    assert [text for text in shown if text.startswith("something")] == ["something: a peer", "something: a slow peer"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["encoding", "--text", "absent.txt"], ["nothing-of-that-name"]])
def test_usage_error_is_one_line_without_a_traceback(arguments, tmp_path):
    ran = python("-m", "benchmarks", *arguments, "--results", tmp_path, cwd=ROOT)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert arguments[-1] in ran.stderr


@pytest.mark.parametrize("kind, least", [("source", 900_000), ("manual", 300_000)])
def test_texts_of_python_are_long_enough_to_train_on(kind, least, tmp_path):
    WRITERS[kind](tmp_path / "text.txt")
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert least < len(text) < 1_200_000
    assert 50 < len(set(text)) < 300


def test_reference_model_attends_only_to_the_past():
    torch.manual_seed(0)
    model = peers.Reference(11, n_layer=2, n_head=2, n_embd=8, block_size=6)
    ids = torch.randint(11, (2, 6))
    before = model(ids)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 11
    assert torch.equal(before[:, :4], model(changed)[:, :4])
    assert not torch.equal(before[:, 4:], model(changed)[:, 4:])
    assert model.generate(ids, 3).shape == (2, 9)


def test_nanogpt_learning_rate_matches_its_documentation():
    rate = peers.NanoGPTTraining.learning_rate
    assert rate(100) == pytest.approx(1e-3)
    assert rate(1050) == pytest.approx(5.5e-4)
    assert rate(2000) == rate(5000) == pytest.approx(1e-4)


@pytest.mark.slow
def test_measures_of_a_gpu_run_on_a_cpu_in_a_small_form(tmp_path):
    arguments = ["--device", "cpu", "--text", "data/drama.txt", "--results", tmp_path]
    ran = python("-m", "benchmarks.gpu", *arguments, cwd=ROOT, MINIGPT_CPU="off")
    assert ran.returncode == 0, ran.stderr
    (written,) = tmp_path.glob("*.json")
    measures = json.loads(written.read_text())["measures"]
    assert set(measures) == set(gpu.MEASURES)
    assert not {name: found["missing"] for name, found in measures.items() if "missing" in found}
    exact = [value for name, value in measures["numerics"].items() if "float32" in name]
    assert 0 < max(exact) < 1e-5
    assert measures["DDP of one process"]["bitwise equal"] == measures["writing 1 text"]["as on the CPU"] == 1
    table = written.with_suffix(".md").read_text()
    assert "| numerics | recipe, float32, logits |" in table


def test_measure_that_fails_is_reported_and_does_not_stop_the_others(tmp_path):
    options = argparse.Namespace(device="no-device", text=tmp_path / "missing.txt")
    assert "no-device" in gpu.run_measure("numerics", options, 60)["missing"]
    assert gpu.run_measure("numerics", options, 0.1)["missing"] == "not finished in the 0 s that were left"
