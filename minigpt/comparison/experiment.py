"""Experiments and their results, read from a folder, a DVC experiment or a git revision.

A folder has the files as they are. The files of a revision are in git or, if a stage wrote them, in DVC's cache or
remote. Results are those of the params in ``dvc.lock``: ``params.yaml`` may have been edited since.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minigpt import params
from minigpt.errors import UserError
from minigpt.evaluation.character_losses import FILE, CharacterLosses
from minigpt.files import MODEL, RESULTS, is_run_key, parse_csv
from minigpt.git import git
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

RUN = RESULTS / "train" / "run.json"
NOT_FROM_LOCK = "its results are not those of dvc.lock; `dvc checkout dvc.yaml` or `dvc repro` brings those"
Row = dict[str, Any]

MAX_COMMITS = 10
"""Earlier commits whose results are listed and searched. Reading one takes up to a second."""


class Files(Protocol):
    """Files of an experiment."""

    def read(self, path: str | Path) -> bytes | None:
        """Return the content of a file, or None if the experiment does not have it."""


class Folder:
    """Files of a workspace on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str | Path) -> bytes | None:
        """Return the content of a file, or None if there is none."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.root / path}: not readable: {error.strerror}") from None


class Revision:
    """Files of a git commit of the repository in the working directory, with the outputs of its stages."""

    def __init__(self, commit: str) -> None:
        self.commit = commit
        self._known: dict[str, bytes | None] = {}

    def read(self, path: str | Path) -> bytes | None:
        """Return the content of a file, or None if the commit does not have it or neither cache nor remote has it."""
        if str(path) not in self._known:
            self._known[str(path)] = self._read(str(path))
        return self._known[str(path)]

    def _read(self, path: str) -> bytes | None:
        shown = subprocess.run(["git", "show", f"{self.commit}:./{path}"], capture_output=True, check=False)
        if shown.returncode == 0:
            return shown.stdout
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexError  # of a folder that `dvc gc` removed from the cache

        try:
            return bytes(self._outputs.read_bytes(path))
        except (OSError, DvcException, DataIndexError):
            return None

    @cached_property
    def _outputs(self) -> Any:
        from dvc.api import DVCFileSystem  # takes about a second to import

        return DVCFileSystem(rev=self.commit)


@dataclass
class Experiment:
    """One experiment: the name by which the user calls it, and its files.

    ``created`` is the time of its commit in seconds since 1970; 0 for a folder.
    """

    name: str
    files: Files
    created: int = 0
    baseline: str = field(default="", kw_only=True)

    @cached_property
    def params(self) -> dict[str, Any]:
        """Params of the results by dotted name; keys that were renamed have their present names."""
        tree = self._yaml("params.yaml")
        for stage in _mapping(self._yaml("dvc.lock").get("stages")).values():
            tree |= _mapping(_mapping(_mapping(stage).get("params")).get("params.yaml"))
        return {params.RENAMED.get(name, name): value for name, value in params.flatten(tree).items()}

    @cached_property
    def code(self) -> dict[str, str]:
        """Digests of the files and folders of code that made the model, by path."""
        deps = self._digests("train", "deps")
        return {path: digest for path, digest in deps.items() if path.startswith(("minigpt/", "stages/"))}

    @property
    def weights(self) -> str:
        """Digest of the exported model, or an empty text. Models with equal digests are bitwise equal."""
        return self._digests("train", "outs").get(str(MODEL), "")

    @cached_property
    def is_from_lock(self) -> bool:
        """Whether the results are those of ``dvc.lock``; in a workspace, git may have changed that file since."""
        recorded = self._digests("evaluate", "deps").get(str(RUN))
        content = self.files.read(RUN)
        return not recorded or content is None or hashlib.md5(content, usedforsecurity=False).hexdigest() == recorded

    def _digests(self, stage: str, kind: str) -> dict[str, str]:
        """Return the digests of the inputs (``deps``) or outputs (``outs``) of a stage, by path."""
        listed = _mapping(_mapping(self._yaml("dvc.lock").get("stages")).get(stage)).get(kind)
        entries = map(_mapping, listed if isinstance(listed, list) else ())
        return {str(entry.get("path")): str(entry.get("md5")) for entry in entries}

    def _yaml(self, path: str) -> dict[str, Any]:
        text = (self.files.read(path) or b"").decode("utf-8", "replace")
        return _mapping(params.read_yaml(text, f"{self.name}: {path}"))

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return ``metrics.json`` of a stage, empty if there is none."""
        path = RESULTS / stage / "metrics.json"
        metrics = self._json(path)
        if not all(isinstance(metrics.get(split, {}), dict) for split in ("train", "val", "test")):
            raise self._damaged(path)
        return metrics

    @cached_property
    def run(self) -> dict[str, Any]:
        """Key, name and date of the MLflow run, as far as they are known."""
        return self._json(RUN)

    @property
    def run_id(self) -> str:
        """ID of the MLflow run in the present store, or an empty text if it is not known here."""
        key = str(self.run.get("run", ""))
        ids = Journal(key).mlflow_ids() if is_run_key(key) else {}
        return ids.get(Uploader(resolve_tracking_uri()).display_uri, "")

    def _json(self, path: Path) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            content = json.loads(self.files.read(path) or b"{}")
            if isinstance(content, dict):
                return content
        raise self._damaged(path)

    def _damaged(self, path: Path) -> UserError:
        return UserError(f"{self.name}: {path}: damaged; `dvc checkout --force dvc.yaml` restores it")

    def table(self, path: str) -> list[Row]:
        """Return the rows of a CSV file below ``results``, with numbers as numbers; empty if there is none."""
        text = (self.files.read(RESULTS / path) or b"").decode("utf-8", "replace")
        return parse_csv(text)

    @cached_property
    def losses(self) -> CharacterLosses:
        """Losses of the characters of the validation split.

        Raises:
            UserError: they are missing or damaged.
        """
        path = RESULTS / "evaluate" / FILE
        content = self.files.read(path)
        if content is None:
            raise UserError(
                f"{self.name}: {path} is missing: fetch it with `dvc pull` or `dvc exp pull`; an experiment that was "
                "evaluated before this file existed needs `dvc repro evaluate`"
            )
        return CharacterLosses.load(io.BytesIO(content), f"{self.name}: {path}")

    @cached_property
    def val_loss(self) -> float | None:
        """Validation loss in nats per character, or None if it was not measured."""
        value = self.metrics("evaluate").get("val", {}).get("loss")
        return float(value) if isinstance(value, int | float) else None


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping that was read from a file, empty if the file has something else there."""
    return value if isinstance(value, dict) else {}


def experiments() -> Iterator[Experiment]:
    """Yield the DVC experiments of this repository that ran to the end, the newest first."""
    pattern = "%(refname) %(objectname) %(committerdate:unix)"
    listed = git("for-each-ref", f"--format={pattern}", "--sort=-committerdate", "refs/exps")
    for line in listed.splitlines():
        if found := re.fullmatch(r"refs/exps/([0-9a-f]{2}/[0-9a-f]{38,})/(\S+) ([0-9a-f]+) (\d+)", line):
            baseline, name, commit, created = found.groups()
            yield Experiment(name, Revision(commit), int(created), baseline=baseline.replace("/", ""))


def committed() -> Iterator[Experiment]:
    """Yield the results that the branch has in its last MAX_COMMITS changes of ``dvc.lock``, the newest first."""
    listed = git("log", f"--max-count={MAX_COMMITS}", "--format=%h %H %ct", "--", "dvc.lock")
    for abbreviated, commit, created in map(str.split, listed.splitlines()):
        yield Experiment(abbreviated, Revision(commit), int(created))


def _is_run(experiment: Experiment, name: str) -> bool:
    """Return whether an experiment has the run with this name, or with this start of its key or of its MLflow ID."""
    run = experiment.run
    key = str(run.get("run", ""))
    if re.fullmatch("[0-9a-f]{6,32}", name):
        ids = [key, *(Journal(key).mlflow_ids().values() if is_run_key(key) else [])]
        return any(each.startswith(name) for each in ids)
    return bool(name) and run.get("name") == name


def find(name: str) -> Experiment:
    """Return the experiment that the user means: a folder, a DVC experiment, a git revision or a run, in this order.

    ``workspace`` is the folder in which the command runs. A run is named by its MLflow name, or by at least 6 digits of
    its MLflow ID or key.

    Raises:
        UserError: there is none.
    """
    root = Path() if name == "workspace" else Path(name)
    if (root / RESULTS).is_dir():
        return Experiment(name, Folder(root))
    known = list(experiments())
    if found := next((each for each in known if each.name == name), None):
        return found
    if commit := git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"):
        return Experiment(name, Revision(commit))
    workspace = [Experiment("workspace", Folder(Path()))] if RESULTS.is_dir() else []
    if found := next((each for each in [*known, *workspace, *committed()] if _is_run(each, name)), None):
        return found
    if name == "workspace" or root.is_dir():
        raise UserError(f"{name}: has no folder {RESULTS}; expected the folder of a workspace after `dvc repro`")
    import difflib

    close = difflib.get_close_matches(name, [each.name for each in known], n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `minigpt compare` lists the experiments"
    raise UserError(f"{name}: no folder, DVC experiment, git revision or run has this name{hint}")
