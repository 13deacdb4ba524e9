"""Tests of parts of the summary. The pipeline's tests show it whole."""

from pathlib import Path

import pytest
import yaml
from helpers.workspace import make_repository, set_params

from minigpt import summary
from minigpt.comparison.experiment import Experiment, Folder
from minigpt.files import write_csv
from minigpt.params import load


def rows(count, split="val"):
    same = {"split": split, "characters": 90}
    return [{"file": f"songs/{n}.txt", **same, "loss": 1 + n / 8, "standard_error": 0.01} for n in range(count)]


@pytest.mark.parametrize("count, last", [(2, "songs/0.txt"), (5, "songs/0.txt"), (6, "files.csv"), (999, "files.csv")])
def test_summary_lists_at_most_five_files_the_highest_loss_first(tmp_path, count, last):
    write_csv(tmp_path / "files.csv", rows(count))
    lines = summary._by_file(tmp_path / "files.csv").splitlines()
    assert len(lines) == min(5, count)
    assert lines[0] == f"  loss by file      {1 + (count - 1) / 8:.4f} ± 0.0100 nats  songs/{count - 1}.txt"
    assert lines[-1].endswith(last)
    if count > 5:
        assert f"and {count - 4} files with lower losses: " in lines[-1]


def test_summary_shows_the_files_of_the_test_split_if_there_is_one(tmp_path):
    test = rows(2, "test")
    test[1] |= {"standard_error": "", "file": "a\x1b[2J\n" + "b" * 99}
    write_csv(tmp_path / "files.csv", [*test, *rows(9)])
    lines = summary._by_file(tmp_path / "files.csv").splitlines()
    assert lines[0] == "  test loss by file 1.1250          nats  a?[2J?" + "b" * 29 + "…"
    assert lines[1] == "                    1.0000 ± 0.0100 nats  songs/0.txt"
    assert max(map(len, lines)) <= 80


def test_summary_of_one_file_has_no_such_lines(tmp_path):
    assert summary._by_file(tmp_path / "files.csv") == ""


def test_summary_of_an_experiment_in_a_copy_says_how_to_get_its_files(monkeypatch, tmp_path):
    assert summary._place() == ""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_EXP_NAME", "wider")
    assert summary._place().startswith("  Not in this folder yet: dvc exp apply wider brings")


@pytest.mark.parametrize("versus", [{"versus_ngram": {"name": "unigram", "loss": 3.402, "difference": -0.001}}, {}])
def test_verdict_compares_with_an_ngram_model_even_if_uniform_guessing_is_better(versus):
    baselines = {"uniform": 3.4, "unigram": 3.402, "2-gram": 3.5}
    evaluation = {"val": {"loss": 3.401}, "baselines": baselines} | versus
    verdict = " ".join(summary._verdict({"best_step": 5, "steps": 9}, evaluation).split())
    assert verdict == "verdict better than the best n-gram model (unigram: 3.4020) by 0.0010 nats"


def test_short_text_gets_no_verdict():
    baselines = {"uniform": 3.4, "2-gram": 2.5}
    evaluation = {"val": {"loss": 2.4, "characters": 999}, "baselines": baselines, "versus_ngram": {"difference": -0.1}}
    verdict = " ".join(summary._verdict({"best_step": 5, "steps": 9}, evaluation).split())
    assert verdict.startswith("verdict none: 999 characters of validation text are too few; ")


def test_training_that_never_improved_is_explained():
    evaluation = {"val": {"loss": 3.4}, "baselines": {"2-gram": 2.5}}
    assert "a smaller train.learning_rate may help" in " ".join(
        summary._verdict({"best_step": 0, "steps": 9}, evaluation).split()
    )


def test_changed_params_are_those_of_the_results(tmp_path, project_files, monkeypatch):
    monkeypatch.chdir(make_repository(tmp_path / "work", project_files))
    trained = yaml.safe_load(Path("params.yaml").read_text())
    trained["train"]["seed"] = 7
    lock = {"stages": {"train": {"params": {"params.yaml": trained}}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    set_params(Path(), {"model": {"n_embd": 28}, "sample": {"seed": 3}})
    workspace = Experiment("workspace", Folder(Path()))
    assert summary._changed(load(), workspace).splitlines() == [
        "",
        "  changed params    train.seed=7 (compared with the last commit)",
        "  not run yet       n_embd=28 train.seed=1337 sample.seed=3 (in params.yaml);",
        "                    `dvc repro` runs it",
    ]
    assert "changed params    n_embd=28 sample.seed=3" in summary._changed(load(), None)
    assert "not run yet" not in summary._changed(load(), None)


def test_lines_do_not_end_within_a_command():
    lines = summary._labelled("verdict", f"{'x' * 50} `minigpt compare`; {'y' * 40}").splitlines()
    assert [line.strip() for line in lines] == [f"verdict           {'x' * 50}", f"`minigpt compare`; {'y' * 40}"]
