"""A run as the stages see it: they record to a journal, and a background upload sends it to the store."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from minigpt.errors import UserError
from minigpt.files import read_run_key, write_atomically, write_csv
from minigpt.params import Params, flatten
from minigpt.tracking.background import BackgroundUploader
from minigpt.tracking.journal import Journal
from minigpt.tracking.note import describe_results
from minigpt.tracking.provenance import COMMIT_TAG, provenance
from minigpt.tracking.sender import Sender
from minigpt.tracking.store import NOTE_TAG, RUN_ID, describe_error, resolve_tracking_uri
from minigpt.tracking.system_metrics import Monitor, describe_device
from minigpt.tracking.uploader import Uploader

# Names of metrics in MLflow. Its page makes a section of charts for each part before a slash, in alphabetical order.
NAMES = {
    "train_loss": "loss/train", "val_loss": "loss/val", "batch_loss": "training/batch_loss",
    "learning_rate": "training/learning_rate", "grad_norm": "training/grad_norm",
    "chars_per_second": "training/chars_per_second",
}  # fmt: skip
# Single values get a bar chart each, so only those by which people compare runs are metrics. All are in the artifacts.
RESULTS = {
    "train.train_seconds": "results/train_seconds", "evaluate.test.loss": "results/test_loss",
    "evaluate.test.standard_error": "results/test_standard_error", "evaluate.val.loss": "results/val_loss",
    "evaluate.val.standard_error": "results/val_standard_error", "evaluate.val.accuracy": "results/val_accuracy",
    "evaluate.val.calibration_error": "results/calibration_error", "evaluate.train.loss": "results/train_loss",
    "sample.memorized.longest_run": "results/longest_copied_run",
}  # fmt: skip


class Tracker:
    """Records one run in its journal and uploads it, with a ``sender`` in its process.

    ``live_history`` is a file that grows during a training.
    """

    def __init__(self, key: str, live_history: Path | None = None, sender: Sender | None = None) -> None:
        self.journal, self.live_history = Journal(key), live_history
        self.journal.clear_place()
        self._uploader = Uploader(resolve_tracking_uri())
        self.display_uri = self._uploader.display_uri
        self._background = BackgroundUploader(self._uploader, self.journal, sender)
        self._monitor: Monitor | None = None
        self._failure_reported = self._has_metrics = False

    def begin(self, params: Params, digest: str, sizes: dict[str, int], device: torch.device) -> None:
        """Record the start of a training on a dataset with this digest and these split sizes, or only its resume."""
        journal, model = self.journal, params.model
        starts = self._count_starts()
        if not starts:
            source, shape = Path(params.data.source), f"{model.n_layer}x{model.n_embd} {params.train.optimizer}"
            journal.name(f"{source.stem} {shape} ({os.environ.get('DVC_EXP_NAME') or journal.key[:6]})")
            # The later stages record their own sections.
            journal.params(flatten(params.model_dump(include={"data", "model", "train"})))
            journal.tags(provenance())
            journal.dataset(source.name, str(source), digest, sizes)
            self._record_workspace_files()
        journal.tags({"device": describe_device(device)} | ({"resumed": f"{starts} times"} if starts else {}))
        self._record_experiment()
        journal.hold()
        journal.status("RUNNING")
        self.attempt("system metrics", lambda: self._start_monitor(device))
        self.upload()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record metrics at a step."""
        if not self._has_metrics:
            self._background.wait_until_ready()  # the import of MLflow would slow the first steps, which are timed
        self._has_metrics = True
        self.journal.metrics(step, {NAMES.get(name, name): value for name, value in values.items()})

    def history(self, rows: list[dict[str, float]]) -> None:
        """Write the evaluations so far to the file that `dvc plots show` and editors draw during a training."""
        # The results of another training stay until this one has its own.
        if self.live_history and not (self.live_history.parent / "metrics.json").exists():
            self.live_history.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                write_csv(Path(temporary) / "history.csv", rows)
                write_atomically(self.live_history, (Path(temporary) / "history.csv").read_bytes())

    def curves(self) -> list[dict[str, Any]]:
        """Return the metrics by step in the form that DagsHub reads from git: one row for each value."""
        return [
            {"Name": name, "Value": value, "Timestamp": record["time"], "Step": record["step"]}
            for record in self.journal.records("metrics")
            for name, value in record["values"].items()
            if name in NAMES.values()
        ]

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Record the samples written so far during a training, as a table."""
        with tempfile.TemporaryDirectory() as temporary:
            table = Path(temporary) / "samples.csv"
            write_csv(table, rows)
            self.journal.artifact(table, "train")

    def model(self, package: Path) -> None:
        """Record a packaged model, and that the run has it."""
        self.journal.artifact(package)
        described = yaml.safe_load((package / "MLmodel").read_text(encoding="utf-8"))
        kept = {name: described[name] for name in ("utc_time_created", "model_uuid") if name in described}
        kept["flavors"] = {
            "python_function": {"loader_module": described["flavors"]["python_function"]["loader_module"]}
        }
        # The column "Models" of the page shows this tag, on servers without logged models too.
        history = [{"run_id": RUN_ID, "artifact_path": package.name, **kept}]
        self.journal.tags({"mlflow.log-model.history": json.dumps(history)})

    def results(self, stage: str, metrics: dict[str, float]) -> None:
        """Record those metrics of a stage by which runs are compared."""
        chosen = {RESULTS[name]: value for key, value in metrics.items() if (name := f"{stage}.{key}") in RESULTS}
        if chosen:
            self.journal.stage_metrics(chosen)

    def note(self, results: Path, *stages: str) -> None:
        """Describe the run by what its ``stages`` wrote to the folder ``results``."""

        def describe() -> None:
            self.journal.tags({NOTE_TAG: describe_results(results, stages)})

        self.attempt("description of the run", describe)

    def describe(self) -> dict[str, str | None]:
        """Return the key, name, git commit and start of the run, for files that outlive the journal."""
        records = self.journal.records()
        names = [record["name"] for record in records if record["kind"] == "name"]
        tags = [record["values"] for record in records if record["kind"] == "tags"]
        started = datetime.fromtimestamp(records[0]["time"] / 1000, timezone.utc) if records else None
        return {
            "run": self.journal.key,
            "name": names[0] if names else None,
            "commit": next((values[COMMIT_TAG] for values in tags if COMMIT_TAG in values), None),
            "date": started.isoformat(timespec="seconds") if started else None,
        }

    def end(self, status: str, resumed_at: list[int]) -> None:
        """Record the end of a training, and the steps after which it was resumed; upload the remaining records."""
        if self._monitor:
            self._monitor.stop()
        if resumed_at:
            steps = ", ".join(map(str, resumed_at))
            self.journal.tags({"resumed": f"{self._count_starts() - 1} times, after steps {steps}"})
        self.journal.status(status)
        self.journal.release()
        self.finish()

    def stage(self, name: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        """Record the params and the metrics of a later stage, and upload all."""
        journal, experiment = self.journal, os.environ.get("DVC_EXP_NAME", "")
        if not journal.records("name"):
            journal.name(f"{experiment or journal.key[:6]} (restored)", restored=True)
        self._record_experiment()
        journal.params(params)
        self.results(name, metrics)
        self._record_workspace_files()
        journal.status("FINISHED")
        named = journal.records("name")[0]
        origin = " (trained elsewhere)" if named.get("restored") else ""
        if self.finish():
            print(f"minigpt: {name} added to run {journal.key[:8]} '{named['name']}'{origin} in {self.display_uri}")

    def upload(self) -> None:
        """Flush the journal to the disk and request an upload. Only the first failure is reported."""
        self.journal.flush()
        self._background.request()
        if self._background.error and not self._failure_reported:
            self._failure_reported = True
            problem = f"{self.display_uri} does not accept the run: {describe_error(self._background.error)}"
            print(f"minigpt: {problem}; the stage continues, and the journal keeps all records", file=sys.stderr)

    def finish(self) -> bool:
        """Upload the remaining records, and return whether the store has all. If not, report how to send them later."""
        self.journal.flush()
        if self._uploader.store.local:
            self._background.error = None
        self._background.request()
        if reason := self._background.wait():
            missing = f"{self._uploader.missing(self.journal)} records of run {self.journal.key[:8]}"
            problem = f"{missing} are not in {self.display_uri} yet: {reason}"
            print(f"minigpt: {problem}; run `minigpt sync` to send them", file=sys.stderr)
        return not reason

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Call an action that only tracking needs. An error is reported and does not end the training."""
        try:
            action()
        except Exception as error:
            print(f"minigpt: {what} failed: {describe_error(error)}", file=sys.stderr)

    def _record_experiment(self) -> None:
        """Record the DVC experiment: several may share a training, or retry one that failed."""
        if experiment := os.environ.get("DVC_EXP_NAME"):
            add_experiment(self.journal, experiment)

    def _count_starts(self) -> int:
        return sum(1 for record in self.journal.records("status") if record["status"] == "RUNNING")

    def _record_workspace_files(self) -> None:
        for path in (Path("params.yaml"), Path("dvc.lock")):  # they name the exact inputs of the run
            if path.exists():
                self.journal.artifact(path)

    def _start_monitor(self, device: torch.device) -> None:
        """Record system metrics by the seconds since the run began. Unlike a clock, they never decrease."""
        recorded = self.journal.records("metrics")
        steps = [r["step"] for r in recorded if any(name.startswith("system/") for name in r["values"])]
        age = time.time() - self.journal.records()[0]["time"] / 1000
        began = time.monotonic() - max(0, age, *(step + 1 for step in steps[-1:]))

        def record(values: dict[str, float]) -> None:
            if self._has_metrics:  # MLflow's Compare offers the metric that was recorded first: no system metric
                self.journal.metrics(int(time.monotonic() - began), values)

        self._monitor = Monitor(record, device)


def add_experiment(journal: Journal, name: str) -> bool:
    """Record that a DVC experiment has the run of a journal. Return whether that was unknown."""
    tag = "dvc.experiment"
    known = [record["values"][tag] for record in journal.records("tags") if tag in record["values"]][-1:]
    if name in ", ".join(known).split(", "):
        return False
    journal.tags({tag: ", ".join([*known, name])})
    return True


def key_of_model(record: Path) -> str:
    """Return the key of the run that trained this workspace's model. ``record`` is the file that names the run."""
    try:
        return read_run_key(record)
    except (OSError, ValueError) as error:
        raise UserError(f"{record}: does not name a run ({error}); create it with `dvc repro train`") from None


def tracker_of_model(record: Path, sender: Sender | None = None) -> Tracker:
    """Return the tracker of the run that trained this workspace's model. ``record`` is the file that names the run."""
    tracker = Tracker(key_of_model(record), sender=sender)
    tracker.upload()
    return tracker
