"""Journals for the tests, and comparisons of journals with stores."""

from pathlib import Path

import requests
from mlflow import MlflowClient

from helpers.servers import TOKEN
from minigpt.tracking.journal import Journal

SYNC = "from minigpt.tracking.uploader import sync; sync()"
SEND = """\
import sys
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import resolve_tracking_uri
from minigpt.tracking.uploader import Uploader
journal = Journal(sys.argv[1])
if not journal.records():
    journal.name("a run")
Uploader(resolve_tracking_uri(), 60).send(journal)
"""
"""Programs for other processes."""


def write_run(key="a" * 32, steps=2500):
    """Write a journal with records of every kind."""
    journal = Journal(key)
    journal.name("a run")
    journal.params({"model.n_embd": 128, "sample.prompts": ["\n"] * 300})
    journal.tags({"git": "none"})
    journal.dataset("songs.txt", "data/songs.txt", "d" * 64, {"train": 90, "val": 10})
    journal.status("RUNNING")
    for step in range(steps):
        journal.metrics(step, {"train_loss": 1 / (step + 1), "val_loss": 2 / (step + 1)})
    (journal.folder / "notes.txt").write_text("text")
    journal.artifact(journal.folder / "notes.txt", "sample")
    journal.status("FINISHED")
    return journal


def find_run(uri, key="a" * 32):
    """Return a client of the store and the only run with this key."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("minigpt")
    runs = client.search_runs([experiment.experiment_id], f"tags.`minigpt.run` = '{key}'")
    assert len(runs) == 1
    return client, runs[0]


def list_artifacts(uri, run_id, folder):
    """Return paths and sizes of artifacts. The current client cannot list those of an old server."""
    folder = "" if folder == "." else folder
    if not uri.startswith("http"):
        return {(file.path, file.file_size) for file in MlflowClient(uri).list_artifacts(run_id, folder)}
    answer = requests.get(
        f"{uri}/api/2.0/mlflow/artifacts/list", {"run_id": run_id, "path": folder}, auth=(TOKEN, TOKEN), timeout=30
    )
    return {(file["path"], int(file.get("file_size", 0))) for file in answer.json()["files"]}


def check_store(uri, key="a" * 32):
    """Check that the store contains every record of the journal exactly once."""
    client, run = find_run(uri, key)
    journal = Journal(key)
    assert run.info.run_name == journal.records("name")[0]["name"]
    assert run.info.status == journal.records("status")[-1]["status"]
    for record in journal.records("params"):
        assert record["values"].items() <= run.data.params.items()
    for record in journal.records("tags"):
        assert record["values"].keys() <= run.data.tags.keys()
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == [r["name"] for r in journal.records("dataset")]
    written = {}
    for record in journal.records("metrics"):
        for name, value in record["values"].items():
            written.setdefault(name, []).append((record["step"], record["time"], value))
    assert set(run.data.metrics) == set(written)
    for name, points in written.items():
        stored = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert sorted(stored) == sorted(points), name
    for record in journal.records("artifact"):
        path = Path(record["path"])
        size = (journal.folder / "artifacts" / path).stat().st_size
        assert (record["path"], size) in list_artifacts(uri, run.info.run_id, path.parent.as_posix())
