"""Tests of whole stages with tracking: faults during a training, and queued experiments."""

import csv
import hashlib
import json
import re
import time

import psutil
import pytest
from helpers.servers import TOKEN, Proxy, free_port
from helpers.tracking import check_store
from helpers.workspace import FULL, command, make_repository, make_workspace, python, set_params
from mlflow import MlflowClient

from minigpt.params import flatten, load
from minigpt.tracking import store


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, project_files):
    """Return a workspace in which the prepare stage has been run."""
    folder = make_workspace(tmp_path_factory.mktemp("prepared") / "work", project_files)
    set_params(folder, {"train": {"max_iters": 200, "eval_interval": 20}})
    ran = python("-m", "stages.prepare", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def run_with_store(folder, uri, *arguments):
    """Run a module in ``folder`` and return its standard error."""
    ran = python(
        "-m", *arguments, cwd=folder, MLFLOW_TRACKING_URI=uri,
        MLFLOW_TRACKING_USERNAME=TOKEN, MLFLOW_TRACKING_PASSWORD=TOKEN,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def weights_digest(folder):
    return hashlib.sha256((folder / "models/gpt/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_server_faults_do_not_change_a_training(current_server, prepared, logged_in, monkeypatch):
    printed = run_with_store(prepared, current_server, "stages.train")
    assert "minigpt:" not in printed or "the upload did not finish" in printed
    weights = weights_digest(prepared)
    for fault, after in [
        ("drop", 6), *([("refuse", 0), ("hang", 0), ("hang", 8), ("lose", 7), (401, 0), (500, 9)] if FULL else []),
    ]:  # fmt: skip
        with Proxy({"": current_server}) as proxy:
            proxy.fault, proxy.after = fault, after
            uri = f"http://127.0.0.1:{free_port()}" if fault == "refuse" else proxy.url
            printed = run_with_store(prepared, uri, "stages.train")
            assert weights_digest(prepared) == weights
            messages = [line for line in printed.splitlines() if line.startswith("minigpt:")]
            assert len([line for line in messages if "does not accept the run" in line]) <= 1, printed
            assert len([line for line in messages if "`minigpt sync`" in line]) == 1, printed
            assert len(messages) <= 2, printed
            assert "Traceback" not in printed
            assert TOKEN not in printed
            key = json.loads((prepared / "results/train/run.json").read_text())["run"]
            proxy.fault = None
            run_with_store(prepared, current_server, "minigpt", "sync")
            monkeypatch.chdir(prepared)
            check_store(current_server, key)


def stop_queue_workers(folder):
    """Kill workers that the empty queue did not end: of two that start concurrently, one may lose its address."""
    for worker in psutil.process_iter(["cmdline", "cwd"]):
        if "queue-worker" in (worker.info["cmdline"] or ()) and str(worker.info["cwd"]).startswith(str(folder)):
            worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10 if FULL else 1))
def test_queued_experiments_are_complete_runs_in_one_store(tmp_path, project_files, monkeypatch, request, number):
    """In full, two workers run eight experiments while one runs outside the queue. Prints the seconds."""
    folder = make_repository(tmp_path / "repository", project_files)
    seeds = [str(seed) for seed in range(9 if FULL else 3)]
    began = time.perf_counter()
    queued = command("dvc", "exp", "run", "--queue", "-S", f"train.seed={','.join(seeds[1:])}", cwd=folder)
    assert queued.returncode == 0, queued.stderr
    request.addfinalizer(lambda: stop_queue_workers(folder))
    # Not through pipes: the workers would keep them open, and the command would seem to run as long as they do.
    assert command("sh", "-c", "dvc queue start -j 2 > queue.log 2>&1", cwd=folder).returncode == 0
    outside = command("dvc", "exp", "run", "--temp", "-S", "train.seed=0", cwd=folder)
    assert outside.returncode == 0, outside.stdout + outside.stderr
    while re.search("Queued|Running", status := command("dvc", "queue", "status", cwd=folder).stdout):
        time.sleep(2)
    assert status.count("Success") == len(seeds) - 1, status
    shown = command("dvc", "exp", "show", "--csv", "--no-pager", cwd=folder).stdout
    experiments = {row["Experiment"]: row for row in csv.DictReader(shown.splitlines()) if row["Experiment"]}
    assert sorted(row["train.seed"] for row in experiments.values()) == seeds

    assert list(folder.rglob("mlflow.db")) == [folder / "mlflow.db"]
    for name in ("MLFLOW_TRACKING_URI", "DAGSHUB_REPO", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    uri = store.resolve_tracking_uri()
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])
    names = {run.info.run_id: re.fullmatch(r"songs 2x20 muon \((.+)\)", run.info.run_name)[1] for run in runs}
    assert set(names.values()) == set(experiments)
    assert len(runs) == len(seeds)
    settings = load(folder / "params.yaml").model_dump()
    for run in runs:
        check_store(uri, run.data.tags["minigpt.run"])
        name = names[run.info.run_id]
        row = experiments[name]
        assert run.data.tags["dvc.experiment"] == name
        settings["train"]["seed"] = int(row["train.seed"])
        flat = flatten(settings) | {"parameters": row["parameters"]}
        assert run.data.params == {key: str(value) for key, value in flat.items()}
        assert run.info.status == "FINISHED"
        assert run.data.metrics["results/val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-12)
        assert len(client.get_metric_history(run.info.run_id, "loss/val")) == 4
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert files == {"model", "evaluate", "sample", "train", "params.yaml", "dvc.lock"}
    print(f"round {number}: {len(seeds)} complete runs of {len(seeds)}, {time.perf_counter() - began:.0f} s")
