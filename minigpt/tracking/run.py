"""TODO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.data.dataset import Corpus
from minigpt.errors import UserError
from minigpt.params import Params, flatten
from minigpt.tracking.background import BackgroundUploader
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import reason, resolve_tracking_uri
from minigpt.tracking.system_metrics import Monitor, describe
from minigpt.tracking.uploader import Uploader

if TYPE_CHECKING:
    import torch

TRAINED = ("data", "model", "train")
"""The sections of params.yaml that the train stage records; the later stages record their own."""


class Tracker:
    """A run as a stage sees it: everything goes to its journal, and from there to the store, if that answers.

    Args:
        key: of the run.
    """

    def __init__(self, key: str) -> None:
        self.journal = Journal(key)
        self._mirror = Uploader(resolve_tracking_uri())
        self._sender = BackgroundUploader(self._mirror, self.journal)
        self._monitor: Monitor | None = None
        self._told = False

    @property
    def display_uri(self) -> str:
        """Where the run can be seen."""
        return self._mirror.display_uri

    def begin(self, params: Params, corpus: Corpus, device: torch.device) -> None:
        """Say what is trained on what, and where; of a run that goes on, only that it does."""
        journal, model = self.journal, params.model
        starts = sum(1 for record in journal.records("status") if record["status"] == "RUNNING")
        if not starts:
            source = Path(params.data.source)
            shape = f"{source.stem} {model.n_layer}x{model.n_embd} {journal.key[:6]}"
            journal.name(os.environ.get("DVC_EXP_NAME") or shape)
            journal.params(flatten({key: value for key, value in params.model_dump().items() if key in TRAINED}))
            journal.tags(provenance())
            journal.dataset(
                source.name, str(source), corpus.digest, {"train": len(corpus.train), "val": len(corpus.val)}
            )
            self.workspace_files()
        journal.tags({"device": describe(device)} | ({"resumed": f"{starts} times"} if starts else {}))
        journal.status("RUNNING")
        self.attempt("load of the machine", lambda: self._watch(device))
        self.mirror()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write values at a step to the journal."""
        self.journal.metrics(step, values)

    def end(self, status: str, resumed_at: list[int]) -> None:
        """Say how the training ended, and after which steps it was resumed; send all of it."""
        if self._monitor:
            self._monitor.stop()
        if resumed_at:
            starts = sum(1 for record in self.journal.records("status") if record["status"] == "RUNNING")
            self.journal.tags({"resumed": f"{starts - 1} times, after steps {', '.join(map(str, resumed_at))}"})
        self.journal.status(status)
        self.finish()

    def stage(self, name: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add what a later stage did to the run, and send it: its params, and its metrics as ``name.metric``."""
        experiment = os.environ.get("DVC_EXP_NAME", "")
        if not self.journal.records():
            self.journal.name(f"{experiment or self.journal.key[:6]} (restored)", restored=True)
        known = [record["values"].get("dvc.experiment", "") for record in self.journal.records("tags")]
        known = list(filter(None, known))[-1:]
        if experiment and experiment not in ", ".join(known).split(", "):
            self.journal.tags({"dvc.experiment": ", ".join([*known, experiment])})
        self.journal.params(params)
        if metrics:
            self.journal.again({f"{name}.{metric}": value for metric, value in metrics.items()})
        self.workspace_files()
        self.journal.status("FINISHED")
        print(f"minigpt: {name} is part of run {self.journal.key[:8]}, {self.called}, in {self.display_uri}")
        self.finish()

    @property
    def called(self) -> str:
        """The name of the run, and whether its training is on record here."""
        named = self.journal.records("name")[0]
        return f"'{named['name']}'" + (": it was trained elsewhere" if named["restored"] else "")

    def workspace_files(self) -> None:
        """Keep params.yaml and, where there is one, dvc.lock: what this run was made from, to the digest."""
        for path in (Path("params.yaml"), Path("dvc.lock")):
            if path.exists():
                self.journal.artifact(path)

    def mirror(self) -> None:
        """Put what is new on the disk itself, and have it sent. A first failure is told; training goes on."""
        self.journal.flush()
        self._sender.ask()
        if self._sender.error and not self._told:
            self._told = True
            print(
                f"minigpt: {self.display_uri} does not take the run: {reason(self._sender.error)}; training goes on, "
                f"and its journal keeps everything",
                file=sys.stderr,
            )

    def finish(self) -> None:
        """Send the rest; where the store has not taken it in time, say how it gets there."""
        self.journal.flush()
        if self._mirror.local:
            self._sender.error = None
        self._sender.ask()
        if why := self._sender.wait():
            print(
                f"minigpt: {self._mirror.missing(self.journal)} records of run {self.journal.key[:8]} are not in "
                f"{self.display_uri} yet: {why}; `minigpt sync` sends them",
                file=sys.stderr,
            )

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do what only tracking needs: where it fails, say so, and let the training be."""
        try:
            action()
        except Exception as error:
            print(f"minigpt: no {what}: {reason(error)}", file=sys.stderr)

    def _watch(self, device: torch.device) -> None:
        """Measure the load, by the seconds since the run began; they never go back, as a clock may."""
        measured = [
            r["step"] for r in self.journal.records("metrics") if any(n.startswith("system/") for n in r["values"])
        ]
        age = time.time() - self.journal.records()[0]["time"] / 1000
        began = time.monotonic() - max(0, age, *(step + 1 for step in measured[-1:]))
        self._monitor = Monitor(lambda load: self.journal.metrics(int(time.monotonic() - began), load), device)


def tracker_of_model(record: Path) -> Tracker:
    """The tracker of the run that trained this workspace's model, for a later stage.

    Raises:
        UserError: ``record``, the file that names the run, is missing or damaged.
    """
    try:
        key = json.loads(record.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: does not name a run ({error}); `dvc repro train` makes it") from None
    tracker = Tracker(key)
    tracker.mirror()
    return tracker


def provenance() -> dict[str, str]:
    """Tags that say where a run comes from: the git commit, and DVC's name and baseline of the experiment."""
    tags = {}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        tags["git"] = "none"
    for tag, name in (("dvc.experiment", "DVC_EXP_NAME"), ("dvc.baseline", "DVC_EXP_BASELINE_REV")):
        if value := os.environ.get(name):
            tags[tag] = value
    return tags
