import json

import pytest
import torch
from helpers.workspace import ROOT, python

from benchmarks import peers
from benchmarks.__main__ import middle, rows
from benchmarks.contenders import MEASURES


def test_every_measure_has_this_project_first():
    assert all(next(iter(contenders)).startswith("minigpt") for contenders in MEASURES.values())


@pytest.mark.parametrize("unit, peer, ratio", [("characters per second", 50, "2"), ("seconds", 200, "2")])
def test_a_ratio_above_one_means_that_the_project_is_better(unit, peer, ratio):
    found = {"minigpt": middle([{"value": 100}, {"value": 90}, {"value": 500}]), "peer": middle([{"value": peer}])}
    (_, ours, one, _), (_, _, theirs, _) = rows(f"something, {unit}", found)
    assert (ours, one, theirs) == ("100", "1", ratio)


def test_a_peer_that_is_not_installed_is_told_of():
    found = {"minigpt": middle([{"value": 1.0}]), "peer": middle([{"missing": "no such package"}])}
    assert rows("something, seconds", found)[1][-1] == "not measured: no such package"


def test_a_benchmark_runs_and_writes_its_results(tmp_path):
    arguments = ["--rounds", "2", "--megabytes", "1", "--text", "data/songs.txt", "--results", tmp_path]
    ran = python("-m", "benchmarks", "encoding", *arguments, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(written["measures"]) == {"encoding, MB per second"}
    for figures in written["measures"]["encoding, MB per second"].values():
        assert len(figures["values"]) == 2
        assert figures["megabytes"] == pytest.approx(1, rel=0.1)
    assert written["machine"]["torch"] == torch.__version__
    assert next(tmp_path.glob("*.png")).stat().st_size > 5000


@pytest.mark.parametrize("arguments", [["encoding", "--text", "absent.txt"], ["nothing-of-that-name"]])
def test_a_mistake_is_told_in_a_line(arguments, tmp_path):
    ran = python("-m", "benchmarks", *arguments, "--results", tmp_path, cwd=ROOT)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert arguments[-1] in ran.stderr


def test_the_reference_attends_only_to_the_past():
    torch.manual_seed(0)
    model = peers.Reference(11, n_layer=2, n_head=2, n_embd=8, block_size=6)
    ids = torch.randint(11, (2, 6))
    before = model(ids)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 11
    assert torch.equal(before[:, :4], model(changed)[:, :4])
    assert not torch.equal(before[:, 4:], model(changed)[:, 4:])
    assert model.generate(ids, 3).shape == (2, 9)


def test_nanogpts_learning_rate_has_its_documented_ends():
    rate = peers.NanoGPTTraining.learning_rate
    assert rate(100) == pytest.approx(1e-3)
    assert rate(1050) == pytest.approx(5.5e-4)
    assert rate(2000) == rate(5000) == pytest.approx(1e-4)
