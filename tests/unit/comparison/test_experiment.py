import hashlib

import pytest
import yaml
from helpers.experiments import results_folder, two_losses
from helpers.tracking import find_run, write_run

from minigpt.comparison import tables
from minigpt.comparison.experiment import Experiment, Folder, find
from minigpt.errors import UserError
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import resolve_tracking_uri
from minigpt.tracking.uploader import sync


@pytest.fixture
def folder(tmp_path):
    return results_folder(tmp_path / "first", two_losses()[0])


def test_folder_has_its_params_metrics_and_losses(folder):
    found = find(str(folder))
    assert found.params["model.n_embd"] == 128
    assert found.val_loss == found.metrics("evaluate")["val"]["loss"]
    assert found.losses.nats.sum() / 6000 == pytest.approx(found.val_loss)
    assert found.table("train/history.csv")[1] == {"step": 25, "train_loss": 2.5, "val_loss": 2.6}
    assert found.table("train/none.csv") == []


def test_params_of_the_lock_file_are_those_of_the_results(folder):
    stages = {"train": {"params": {"params.yaml": {"train": {"seed": 1, "token_dropout": 0.5}}}}, "sample": {}}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    settings = Experiment("first", Folder(folder)).params
    assert settings["train.seed"] == 1
    assert settings["train.token_noise"] == 0.5  # the present name of token_dropout
    assert settings["model.n_embd"] == 128


def test_missing_and_damaged_results_are_reported(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "results/evaluate/losses.npz").unlink()
    with pytest.raises(UserError, match=r"results/evaluate/losses.npz is missing: fetch it with `dvc pull`"):
        _ = find(str(folder)).losses
    (folder / "results/evaluate/metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"results/evaluate/metrics.json: damaged"):
        _ = find(str(folder)).val_loss
    with pytest.raises(UserError, match="has no folder results"):
        find(str(tmp_path))
    with pytest.raises(UserError, match="no folder, DVC experiment, git revision or run has this name"):
        find("--all")


@pytest.mark.parametrize(
    "name, content",
    [
        ("dvc.lock", "stages: [1]"),
        ("dvc.lock", "stages: {train: 1, sample: {params: [a]}}"),
        ("dvc.lock", "stages: {train: {outs: {a: b}, params: {params.yaml: text}}}"),
        ("params.yaml", "[1]"),
        ("results/evaluate/metrics.json", '{"val": [1]}'),
        ("results/train/metrics.json", "[]"),
    ],
)
def test_file_with_wrong_types_is_left_out_or_reported(folder, name, content):
    (folder / name).write_text(content)
    found = Experiment("first", Folder(folder))
    assert isinstance(found.params, dict)
    assert found.weights == ""
    if name.startswith("results"):
        with pytest.raises(UserError, match=f"^first: {name}: damaged; `dvc checkout --force dvc.yaml` restores it$"):
            found.metrics(name.split("/")[1])
    else:
        assert found.val_loss > 0


@pytest.mark.parametrize("digest, known", [("0" * 32, False), (None, True)])
def test_results_that_are_not_those_of_the_lock_file_are_not_compared(folder, monkeypatch, digest, known):
    digest = digest or hashlib.md5((folder / "results/train/run.json").read_bytes()).hexdigest()
    deps = [{"path": "results/train/run.json", "md5": digest}]
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": {"deps": deps}}}))
    monkeypatch.chdir(folder)
    assert Experiment("workspace", Folder(folder)).is_from_lock == known
    if known:
        assert tables.overview().splitlines()[1].startswith("workspace ")
        return
    for show in (tables.overview, lambda: tables.comparison([find("workspace")] * 2)):
        with pytest.raises(UserError, match=r"^workspace: its results are not those of dvc.lock"):
            show()


def test_folder_without_results_does_not_hide_an_experiment_of_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "run of first").mkdir()
    assert find("run of first").run["name"] == "run of first"


def test_run_is_found_by_its_name_and_by_the_start_of_its_key(folder, monkeypatch):
    monkeypatch.chdir(folder)
    key = find("workspace").run["run"]
    assert find("run of first").run["run"] == find(key[:6]).run["run"] == key
    with pytest.raises(UserError, match="or run has this name"):
        find(key[:5])


def test_run_is_found_by_its_id_in_mlflow(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINIGPT_TRACKING", "local")
    key = find("workspace").run["run"]
    write_run(key, steps=2)
    sync()
    (name,) = Journal(key).mlflow_ids().values()
    _, run = find_run(resolve_tracking_uri(), key)
    assert name == run.info.run_id
    assert find(name).run["run"] == find(name[:8]).run["run"] == key
