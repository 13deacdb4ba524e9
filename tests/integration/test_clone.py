"""A clone of a repository with its results: every stage runs alone after `dvc pull`, in folders with any name."""

import re
import shutil

import pytest
from helpers.workspace import FULL, command, make_repository, set_params

pytestmark = pytest.mark.slow


def run(*arguments, cwd):
    ran = command(*arguments, cwd=cwd)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stdout + ran.stderr


def runs(folder):
    from mlflow import MlflowClient

    from minigpt.tracking.store import sqlite_uri

    client = MlflowClient(sqlite_uri(folder / "mlflow.db"))
    return client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])


@pytest.fixture(scope="module")
def clone(tmp_path_factory, project_files):
    """A clone with the results of the original, from DVC's remote."""
    base = tmp_path_factory.mktemp("clone") / "50%20 a?b #c"
    original = make_repository(base / "original", project_files)
    run("dvc", "repro", cwd=original)
    run("dvc", "remote", "add", "--default", "storage", base / "storage", cwd=original)
    run("dvc", "push", cwd=original)
    run("git", "add", "--all", cwd=original)
    run("git", "commit", "--quiet", "--message", "results", cwd=original)
    run("git", "clone", "--quiet", original, base / "clone", cwd=base)
    run("dvc", "pull", "dvc.yaml", cwd=base / "clone")
    assert {path.name for path in base.iterdir()} == {"original", "storage", "clone"}
    assert [path.name for path in base.parent.iterdir()] == [base.name]
    return base / "clone"


RERUN = {"sample": ["sample"], "evaluate": ["evaluate", "sample"]}
"""The stages that a change of one stage's params runs: the page of `sample` shows the results of `evaluate`."""
CHANGES = {
    "sample": {"sample": {"temperature": 0.5}},
    "evaluate": {"evaluate": {"train_chars": 500}},
}


ORDERS = [("evaluate", True), ("sample", False), *([("sample", True), ("evaluate", False)] if FULL else [])]
"""Stages, and whether each is the first that adds to the journal in the clone."""


@pytest.mark.parametrize("stage, first", ORDERS)
def test_stage_runs_alone_after_a_pull(clone, tmp_path, stage, first):
    folder = tmp_path / "work"
    shutil.copytree(clone, folder, symlinks=True)
    if not first:
        (other,) = set(CHANGES) - {stage}
        set_params(folder, CHANGES[other])
        run("dvc", "repro", cwd=folder)
    set_params(folder, CHANGES[stage])
    printed = run("dvc", "repro", cwd=folder)
    assert re.findall(r"^Running stage '(\w+)'", printed, re.MULTILINE) == RERUN[stage]
    assert f"minigpt: {stage} added to run" in printed
    (found,) = runs(folder)
    assert found.info.run_name.endswith("(restored)")
    assert found.info.status == "FINISHED"
    measured = {"sample": "results/longest_copied_run", "evaluate": "results/val_loss"}
    assert measured[stage] in found.data.metrics
    shutil.rmtree(folder / ".journal")
    section, values = next(iter(CHANGES[stage].items()))
    set_params(folder, {section: {key: value / 2 if stage == "sample" else 250 for key, value in values.items()}})
    run("dvc", "repro", cwd=folder)
    assert len(runs(folder)) == 1
