"""Tests of the tracker: records of a training and of the later stages, and their arrival in a store."""

import csv
import json
import os
import re
import uuid

import pytest
import torch
from helpers.tracking import check_store, find_run, write_run
from helpers.workspace import ROOT, params_with, python

from minigpt.errors import UserError
from minigpt.tracking import store, uploader
from minigpt.tracking.run import Tracker, tracker_of_model
from minigpt.tracking.system_metrics import describe_device

KEY = "d" * 32


def test_training_records_params_dataset_and_device_once():
    for resumed_at in ([], [5]):
        tracker = Tracker(KEY)
        tracker.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
        tracker.end("KILLED" if not resumed_at else "FINISHED", resumed_at)
    _, run = find_run(store.resolve_tracking_uri(), KEY)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.n_layer"] == "2"
    assert not [name for name in run.data.params if not name.startswith(("data.", "model.", "train."))]
    assert run.data.tags["device"] == describe_device(torch.device("cpu"))
    assert run.data.tags["resumed"] == "1 times, after steps 5"
    (dataset,) = tracker.journal.records("dataset")
    assert (dataset["digest"], dataset["profile"]) == ("e" * 64, {"train": 90, "val": 10})
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == ["e" * 32]


def test_stages_can_be_repeated(capsys):
    tracker = Tracker(KEY)
    tracker.journal.name("a run")
    for value in (0.8, 0.5):
        tracker.stage("evaluate", {"sample.temperature": value}, {"val.loss": value, "baselines.2-gram": 2.5})
    client, run = find_run(store.resolve_tracking_uri(), KEY)
    assert run.data.params["sample.temperature"] == "0.8"  # MLflow's params are immutable
    assert run.data.tags["sample.temperature"] == "0.5"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "results/val_loss")] == [0.8, 0.5]
    assert set(run.data.metrics) == {"results/val_loss"}  # others would be bar charts of one value
    assert "evaluate added to run dddddddd 'a run' in sqlite:///" in capsys.readouterr().out


def test_run_names_all_experiments_that_share_its_training(monkeypatch):
    for name in ("first", "second", "first"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        Tracker(KEY).stage("sample", {}, {})
    assert find_run(store.resolve_tracking_uri(), KEY)[1].data.tags["dvc.experiment"] == "first, second"


def test_run_trained_elsewhere_is_extended(here, monkeypatch, capsys):
    key = "f" * 32
    write_run(key, steps=3)
    uploader.sync()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.resolve_tracking_uri())
    (here / "clone").mkdir()
    (here / "clone" / "metrics.json").write_text("{}")
    monkeypatch.setenv("DVC_ROOT", str(here / "clone"))  # has the model, by dvc pull, but not the journal
    tracker = Tracker(key)
    tracker.journal.artifact(here / "clone" / "metrics.json")  # the stages record their files first
    tracker.stage("evaluate", {}, {"val.loss": 1.5})
    assert "(trained elsewhere)" in capsys.readouterr().out
    _, run = find_run(store.resolve_tracking_uri(), key)
    assert run.info.run_name == "a run"
    assert run.data.metrics.keys() == {"train_loss", "val_loss", "results/val_loss"}
    assert "restored" not in run.data.tags
    Tracker("9" * 32).stage("evaluate", {}, {"loss": 1.5})
    _, run = find_run(store.resolve_tracking_uri(), "9" * 32)
    assert run.data.tags["restored"].startswith("DVC restored the training")


def test_run_deleted_during_training_stays_deleted(capsys):
    tracker = Tracker(KEY)
    tracker.journal.name("a run")
    tracker.upload()
    client, run = find_run(store.resolve_tracking_uri(), KEY)
    client.delete_run(run.info.run_id)
    tracker.metrics(1, {"val_loss": 2.0})
    tracker.upload()
    tracker.end("FINISHED", [])
    assert not client.search_runs([run.info.experiment_id])
    printed = capsys.readouterr().out
    assert f"run dddddddd was deleted in {store.resolve_tracking_uri()}; nothing more is sent" in printed


def test_steps_of_system_metrics_increase_even_if_the_clock_goes_back(monkeypatch):
    tracker = Tracker(KEY)
    with monkeypatch.context() as ahead:
        ahead.setattr("minigpt.tracking.journal.time.time", lambda: 4e9)
        tracker.journal.metrics(100, {"system/cpu_utilization_percentage": 50.0})
    tracker.metrics(0, {"val_loss": 2.0})
    tracker._start_monitor(torch.device("cpu"))
    tracker._monitor.stop()
    assert [record["step"] for record in tracker.journal.records()] == [100, 0, 101]


def test_validation_loss_is_the_first_metric():
    tracker = Tracker(KEY)
    tracker.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
    tracker._monitor._record(tracker._monitor.measure())
    assert not tracker.journal.records("metrics")
    tracker.metrics(0, {"val_loss": 4.0, "train_loss": 4.0})
    tracker.end("FINISHED", [])
    names = [name for record in tracker.journal.records("metrics") for name in record["values"]]
    assert names[:2] == ["loss/val", "loss/train"]
    assert all(name.startswith("system/") for name in names[2:])


def test_packaged_model_is_in_the_list_of_the_runs_models(here):
    (here / "model").mkdir()
    (here / "model/MLmodel").write_text(
        "utc_time_created: '2026-01-01 00:00:00'\nmodel_uuid: abc\n"
        "flavors:\n  python_function: {loader_module: loader, code: /a/path}\n"
    )
    tracker = Tracker(KEY)
    tracker.journal.name("a run")
    tracker.model(here / "model")
    tracker.end("FINISHED", [])
    _, run = find_run(store.resolve_tracking_uri(), KEY)
    (model,) = json.loads(run.data.tags["mlflow.log-model.history"])
    assert (model["run_id"], model["artifact_path"]) == (run.info.run_id, "model")
    assert model["flavors"] == {"python_function": {"loader_module": "loader"}}


@pytest.mark.slow
def test_stage_reaches_a_server_with_authentication(server, logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    key = uuid.uuid4().hex
    write_run(key, steps=1200)
    uploader.sync()
    check_store(server, key)
    Tracker(key).stage("evaluate", {"evaluate.stride": 0}, {"loss": 1.5})
    check_store(server, key)


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_missing_or_damaged_run_record_is_reported(here, content):
    record = here / "run.json"
    if content is not None:
        record.write_text(content)
    with pytest.raises(UserError, match=r"run.json: does not name a run .* create it with `dvc repro train`"):
        tracker_of_model(record)


def test_failed_extras_do_not_end_the_training(capsys):
    Tracker(KEY).attempt("loss chart", lambda: os.stat("missing.png"))
    assert "minigpt: loss chart failed: [Errno 2] No such file" in capsys.readouterr().err


def test_samples_of_a_training_are_a_table_of_the_run():
    tracker = Tracker(KEY)
    tracker.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
    rows = [{"step": step, "prompt": "\n", "text": 'a,"b"\n' * step} for step in (0, 5)]
    for count in (1, 2, 2):
        tracker.samples(rows[:count])
    tracker.end("FINISHED", [])
    client, run = find_run(store.resolve_tracking_uri(), KEY)
    path = client.download_artifacts(run.info.run_id, "train/samples.csv")
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [row | {"step": str(row["step"])} for row in rows]
    assert len([record for record in tracker.journal.records("artifact") if "samples" in record["path"]]) == 2


def test_description_of_a_run_outlives_its_journal():
    tracker = Tracker(KEY)
    assert tracker.describe() == {"run": KEY, "name": None, "commit": None, "date": None}
    tracker.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
    tracker.end("FINISHED", [])
    described = tracker.describe()
    assert described["name"] == f"drama 2x20 muon ({KEY[:6]})"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", described["date"])


def test_retry_adds_its_experiment_to_the_run(monkeypatch):
    for name, status in (("failed-one", "FAILED"), ("its-retry", "FINISHED")):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        tracker = Tracker(KEY)
        tracker.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
        tracker.end(status, [])
    _, run = find_run(store.resolve_tracking_uri(), KEY)
    assert (run.data.tags["dvc.experiment"], run.info.status) == ("failed-one, its-retry", "FINISHED")


def test_sync_ends_runs_whose_process_was_killed(here):
    code = (
        "import os, sys, torch\n"
        "from helpers.workspace import params_with\n"
        "from minigpt.tracking.run import Tracker\n"
        "tracker = Tracker(sys.argv[1])\n"
        "tracker.begin(params_with(), 'e' * 64, {'train': 90, 'val': 10}, torch.device('cpu'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ran = python("-c", code, KEY, cwd=here, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert ran.returncode == -9, ran.stderr
    alive = Tracker("c" * 32)
    alive.begin(params_with(), "e" * 64, {"train": 90, "val": 10}, torch.device("cpu"))
    uploader.sync()
    assert find_run(store.resolve_tracking_uri(), KEY)[1].info.status == "KILLED"
    assert find_run(store.resolve_tracking_uri(), "c" * 32)[1].info.status == "RUNNING"
    alive.end("FINISHED", [])
