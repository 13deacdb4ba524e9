"""The mirror of trainings in MLflow: here, on a server, or on DagsHub.

Where runs go: MLFLOW_TRACKING_URI if it is set; else DagsHub, if DAGSHUB_REPO=user/repo and DAGSHUB_USER_TOKEN are;
else mlflow.db in the repository. A store that cannot be reached costs a training nothing but its mirror:
``python -m minigpt.tracking sync`` sends what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from minigpt.corpus import Corpus
from minigpt.errors import UserError, run
from minigpt.journal import EXPERIMENT, Journal, locked, workspace
from minigpt.machine import Monitor, describe
from minigpt.params import Params, flatten

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")

DAGSHUB = "https://dagshub.com"
"""Where DagsHub is; DAGSHUB_CLIENT_HOST, the variable of DagsHub's own client, goes before."""

PATIENCE = 4.0
"""Seconds in all that a stage waits for a store on another machine. What is not sent by then waits for a sync."""

SILENT, AWAY = 2.0, 600
"""A store that takes nothing for the first of these is away: for the second it is not waited for again, unless it takes
something meanwhile. Both in seconds."""

BRIEF = 0.25
"""Seconds for which any stage may wait for a store that is away, to learn why."""

TIMEOUT, SYNC_TIMEOUT = 10, 60
"""Seconds until a request counts as lost, beside a stage and in a sync; MLFLOW_HTTP_REQUEST_TIMEOUT goes before."""

RETRIES, PAUSE = 3, 1.0
"""How often in a row a sync tries again where nothing arrives; seconds before the first time, doubled for each next."""

RUN_TAG = "minigpt.run"
"""The MLflow tag that holds a run's key: how a run is found again."""

METRICS_PER_REQUEST = 1000
"""What MLflow's API takes in one batch."""

UPLOADS = 8
"""Files that are sent at a time: each is a request, and a server spends most of one on checking the password."""

TRAINED = ("data", "model", "train")
"""The sections of params.yaml that the train stage records; the later stages record their own."""

TROUBLES = {
    "Connection refused": "nothing listens there",
    "NameResolutionError": "no such host is known",
    "timed out": "no answer in time",
    "Connection aborted": "the connection broke off",
}
"""What is in the words of the HTTP library, and what it means."""

SECRETS = ("DAGSHUB_USER_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Variables of the environment whose values are never printed."""


def store() -> str:
    """The tracking URI; credentials go to the environment that MLflow reads, never into the URI.

    Raises:
        UserError: DAGSHUB_REPO does not name a repository.
    """
    repo, token = os.environ.get("DAGSHUB_REPO"), os.environ.get("DAGSHUB_USER_TOKEN")
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _placed(_without_credentials(uri))
    if repo and token:
        os.environ |= {"MLFLOW_TRACKING_USERNAME": token, "MLFLOW_TRACKING_PASSWORD": token}
        return f"{dagshub_page(repo)}.mlflow"
    return own_store()


def own_store() -> str:
    """The tracking URI of the repository's own store."""
    return f"sqlite:///{workspace() / 'mlflow.db'}"


def dagshub_page(repo: str) -> str:
    """The address of a repository on DagsHub.

    Raises:
        UserError: ``repo`` is not of the form user/repo.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"DAGSHUB_REPO: expected user/repo, got {repo!r}")
    return f"{os.environ.get('DAGSHUB_CLIENT_HOST', DAGSHUB).rstrip('/')}/{repo}"


def _placed(uri: str) -> str:
    """``uri`` with a relative path taken from the main workspace: a copy of it would take the store along."""
    if match := re.fullmatch(r"(sqlite:///)([^/].*)", uri):
        return f"{match[1]}{workspace() / match[2]}"
    if uri.startswith("file:") and not uri.startswith("file:/"):
        uri = uri.removeprefix("file:")
    return str(workspace() / uri) if ":" not in uri and not uri.startswith("databricks") else uri


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.scheme.startswith("http") or "@" not in parts.netloc:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    os.environ["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return os.environ["MLFLOW_TRACKING_URI"]


class Mirror:
    """Sends journals to a store: each record once, in order, however often it is interrupted.

    How far a journal has been sent is kept beside it, in a file for each store: the byte that comes next, and the
    byte up to which a request was under way. Where that request's answer was lost, the store is asked which metrics
    it has; to send the rest again changes nothing in MLflow.

    Args:
        uri: the tracking URI of the store.
        timeout: seconds until a request counts as lost.

    Attributes:
        place: the URI as it may be printed, without credentials.
        sent: records sent so far, of all journals.
        taken: when the store took the last of them, by ``time.monotonic``.
    """

    def __init__(self, uri: str, timeout: int = TIMEOUT) -> None:
        self.uri, self.timeout = uri, timeout
        self.place = re.sub("://[^/]*@", "://", uri)
        self.local = uri.startswith(("sqlite:", "file:")) or ":" not in uri
        self._client: MlflowClient | None = None
        self.sent, self.taken = 0, -math.inf
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def send(self, journal: Journal, check: bool = False) -> None:
        """Send what the store does not have yet. A run that was deleted there is left alone.

        Args:
            journal: of the run.
            check: ask the store whether it still has the run, even where all was sent.

        Raises:
            Exception: whatever MLflow raises where the store cannot be reached or refuses.
        """
        if check or self.missing(journal):
            with locked(self._progress(journal)) as file:
                try:
                    self._send_from(journal, file)
                except Exception:
                    self._runs.pop(journal.key, None)  # it may be gone there: look for it again
                    raise

    def missing(self, journal: Journal) -> int:
        """How many records have not been sent, as far as is known on this side."""
        try:
            return len(journal.since(_read_progress(self._progress(journal).read_bytes(), journal.size)["next"]))
        except FileNotFoundError:
            return len(journal.records())

    def _progress(self, journal: Journal) -> Path:
        return journal.folder / f"sent-{self._digest}.json"

    @property
    def away(self) -> Path:
        """A file whose age says how long ago the store was waited for in vain."""
        return workspace() / ".journal" / f"away-{self._digest}"

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.uri.encode()).hexdigest()[:8]

    def _send_from(self, journal: Journal, file: IO[bytes]) -> None:
        file.seek(0)
        progress = _read_progress(file.read(), journal.size)

        def note(**changes: int) -> None:
            progress.update(changes)
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"store": self.place, **progress}).encode() + b"\n")
            file.flush()

        if journal.key not in self._runs:
            known, end = self._find(journal.key, self._experiment(journal)), journal.since(0)[-1][1]
            if known is None:
                note(next=0, doubtful=0)
                self._runs[journal.key] = self._create(journal)
            elif known.info.lifecycle_stage == "deleted":
                print(f"minigpt: {self.place}: run {journal.key[:8]} was deleted there: nothing more is sent")
                note(next=end, doubtful=0)
            else:
                self._runs[journal.key] = known.info.run_id
        pending = journal.since(progress["next"])
        journal.flush()  # else a power cut takes from the journal what the store has been sent
        last = {record["path"]: end for record, end in pending if record["kind"] == "artifact"}

        def arrived(end: int, records: int) -> None:
            note(next=end)
            self.sent += records
            self.taken = time.monotonic()

        def upload(entry: tuple[dict[str, Any], int]) -> None:
            record, end = entry
            if last[record["path"]] == end:
                self._send(journal, [record], doubtful=False)

        done = 0
        while done < len(pending):
            group = [pending[done]]
            while done + len(group) < len(pending) and _batches_with(group, pending[done + len(group)][0]):
                group.append(pending[done + len(group)])
            (first, first_end), end = group[0], group[-1][1]
            doubtful = first_end <= progress["doubtful"]
            note(doubtful=max(end, progress["doubtful"]))
            if first["kind"] == "artifact":
                for _, file_end in _abreast(upload, group):
                    arrived(file_end, 1)
            else:
                self._send(journal, [record for record, _ in group], doubtful)
                arrived(end, len(group))
            done += len(group)

    def connect(self) -> MlflowClient:
        """The client of the store; importing MLflow takes seconds, and nothing is sent yet."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self.timeout))
            # MLflow's own second try makes a second run, where only the answer to the first was lost.
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            import logging

            for chatty in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(chatty).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            if not self.local:
                self._client = MlflowClient(self.uri)
                return self._client
            # The first client of a database makes its tables, which must not happen twice at once.
            with locked(workspace() / ".journal" / "store.lock"):
                self._client = MlflowClient(self.uri)
                self._client.get_experiment_by_name(EXPERIMENT)
        return self._client

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is made where there is none."""
        from mlflow.exceptions import MlflowException

        client = self.connect()
        if name not in self._experiments:
            found = client.get_experiment_by_name(name)
            if found and found.lifecycle_stage == "deleted":
                raise UserError(
                    f"its experiment '{name}' was deleted there; "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
                )
            if found is None:
                location = (workspace() / "mlartifacts").as_uri() if self.local else None
                try:
                    self._experiments[name] = client.create_experiment(name, location)
                    return self._experiments[name]
                except MlflowException:  # another process was faster, or its answer was lost
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _experiment(self, journal: Journal) -> str:
        return self.experiment(next((record["experiment"] for record in journal.records("name")), EXPERIMENT))

    def _find(self, key: str, experiment: str) -> Run | None:
        from mlflow.entities import ViewType

        found = self.connect().search_runs(
            [experiment],
            f"tags.`{RUN_TAG}` = '{key}'",
            ViewType.ALL,
            max_results=1,
        )
        return found[0] if found else None

    def _create(self, journal: Journal) -> str:
        records = journal.records()
        named = next((record for record in records if record["kind"] == "name"), {"name": journal.key[:8]})
        tags = {RUN_TAG: journal.key}
        if named.get("restored"):
            tags["restored"] = "DVC restored the training from its cache; its metrics are elsewhere"
        created = self.connect().create_run(self._experiment(journal), records[0]["time"], tags, named["name"])
        return str(created.info.run_id)

    def _send(self, journal: Journal, group: list[dict[str, Any]], doubtful: bool) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self.connect(), self._runs[journal.key]
        kind, record = group[0]["kind"], group[0]
        if kind == "metrics":
            metrics = [Metric(n, v, r["time"], r["step"]) for r in group for n, v in r["values"].items()]
            if doubtful:
                there = {
                    (name, known.timestamp, known.step)
                    for name in {metric.key for metric in metrics}
                    for known in client.get_metric_history(run_id, name)
                }
                metrics = [metric for metric in metrics if (metric.key, metric.timestamp, metric.step) not in there]
            if metrics:
                client.log_batch(run_id, metrics=metrics)
        elif kind == "params":
            has = client.get_run(run_id).data.params
            fresh = [Param(name, value) for name, value in record["values"].items() if name not in has]
            other = [RunTag(n, v) for n, v in record["values"].items() if has.get(n, v) != v]
            client.log_batch(run_id, params=fresh, tags=other)
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in record["values"].items()])
        elif kind == "dataset":
            self._send_dataset(run_id, record)
        elif kind == "artifact":
            folder = PurePosixPath(record["path"]).parent.as_posix()
            kept = journal.folder / "artifacts" / record["path"]
            client.log_artifact(run_id, str(kept), None if folder == "." else folder)
        elif kind == "status":
            if record["status"] == "RUNNING":
                client.update_run(run_id, "RUNNING")
            else:
                client.set_terminated(run_id, record["status"], record["time"])

    def _send_dataset(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:32],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        try:
            self.connect().log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        except MlflowException as error:
            if error.get_http_status_code() != 404:
                raise
            print(f"minigpt: {self.place} knows no datasets; the run has its dataset as a tag", file=sys.stderr)
            self.connect().set_tag(run_id, "dataset", f"{record['name']} {record['digest'][:32]}")


def _read_progress(text: bytes, written: int) -> dict[str, int]:
    """Progress of nothing where ``text``, cut short by a crash, is none: then all ``written`` bytes are doubtful."""
    try:
        read = json.loads(text)
        return {"next": int(read["next"]), "doubtful": int(read["doubtful"])}
    except (ValueError, KeyError, TypeError):
        return {"next": 0, "doubtful": written}


def _batches_with(group: list[tuple[dict[str, Any], int]], record: dict[str, Any]) -> bool:
    kind = group[0][0]["kind"]
    if kind != "metrics" or record["kind"] != "metrics":
        return kind == record["kind"] == "artifact"  # files go together, each in a request of its own
    return sum(len(r["values"]) for r, _ in group) + len(record["values"]) <= METRICS_PER_REQUEST


def _abreast(action: Callable[[T], None], items: list[T]) -> Iterator[T]:
    """Call ``action`` with the first item, then with the others, UPLOADS at a time; gives each back once it is done.

    They come back in their order. The first goes alone: a store that takes nothing is asked once, and where a run's
    files go is looked up once. After an error no call is begun, and those under way are waited for: what is sent again
    must not meet them. The threads are daemons: those of concurrent.futures would hold up the end of the program.

    Raises:
        Exception: that of the first item whose call failed.
    """
    action(items[0])
    yield items[0]
    calls: list[tuple[T, Future[None]]] = [(item, Future()) for item in items[1:]]
    waiting = deque(calls)

    def work() -> None:
        while True:
            try:
                item, call = waiting.popleft()
            except IndexError:
                return
            try:
                action(item)
                call.set_result(None)
            except Exception as error:
                waiting.clear()
                call.set_exception(error)

    threads = [threading.Thread(target=work, name="upload", daemon=True) for _ in calls[:UPLOADS]]
    for thread in threads:
        thread.start()
    try:
        for item, call in calls:
            call.result()
            yield item
    except Exception:
        for thread in threads:
            thread.join()
        raise
    finally:
        waiting.clear()


class Sender:
    """Sends one journal: in a thread where the store is on another machine, so that nobody waits for it.

    Attributes:
        error: of the last try; None after one that came through.
        patience: seconds for which ``wait`` will still wait, in all. Where the store has just been waited for in
            vain, also by another process, there is next to none until the store takes something.
    """

    def __init__(self, mirror: Mirror, journal: Journal) -> None:
        self.error: Exception | None = None
        self._mirror, self._journal = mirror, journal
        self._shy = mirror.away.exists() and abs(time.time() - mirror.away.stat().st_mtime) < AWAY
        self.patience = BRIEF if self._shy else PATIENCE
        self._asked = self._tried = 0
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have what is new sent. A store on this machine has it on return; where it fails, it is not tried again."""
        if self._mirror.local:
            if self.error is None:
                self._try()
            return
        if not self._mirror.missing(self._journal):
            return
        if self._thread is None:
            try:
                self._mirror.connect()
            except Exception as error:
                self.error = error
                return
            self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
            self._thread.start()
        with self._turn:
            self._asked += 1
            self._turn.notify_all()

    def wait(self) -> str:
        """Wait for what was asked; says what kept it from being sent, nothing where it was."""
        began = time.monotonic()
        with self._turn:
            tried = self._turn.wait_for(lambda: self._tried >= self._asked, self.patience)
        waited = time.monotonic() - began
        self.patience = max(0.0, self.patience - waited) if tried else 0.0
        if not self._mirror.missing(self._journal):
            return ""
        if not self._mirror.local and waited > BRIEF and time.monotonic() - self._mirror.taken > SILENT:
            self._mirror.away.touch()
        if self.error and tried:
            return reason(self.error)
        if self._shy:
            return "it was away a moment ago, and is not waited for again so soon"
        return f"not all was taken within {PATIENCE:g} seconds"

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._asked > self._tried)
                asked = self._asked
            self._try()
            with self._turn:
                if self._shy and self.error is None:
                    self._shy, self.patience = False, PATIENCE
                    self._mirror.away.unlink(missing_ok=True)
                self._tried = asked
                self._turn.notify_all()

    def _try(self) -> None:
        try:
            self._mirror.send(self._journal)
            self.error = None
        except Exception as error:
            self.error = error


class Tracker:
    """A run as a stage sees it: everything goes to its journal, and from there to the store, if that answers.

    Args:
        key: of the run.
    """

    def __init__(self, key: str) -> None:
        self.journal = Journal(key)
        self._mirror = Mirror(store())
        self._sender = Sender(self._mirror, self.journal)
        self._monitor: Monitor | None = None
        self._told = False

    @property
    def place(self) -> str:
        """Where the run can be seen."""
        return self._mirror.place

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
        print(f"minigpt: {name} is part of run {self.journal.key[:8]}, {self.called}, in {self.place}")
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
                f"minigpt: {self.place} does not take the run: {reason(self._sender.error)}; training goes on, "
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
                f"{self.place} yet: {why}; `python -m minigpt.tracking sync` sends them",
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


def of_model(record: Path) -> Tracker:
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


def reason(error: Exception) -> str:
    """What an error says, in a few words and without any secret."""
    text = str(error).strip() or type(error).__name__
    if found := re.search(r"error code (\d{3}) !=|too many (\d{3}) error|^(401|403)\b", text):
        status = next(filter(None, found.groups()))
        return f"it answers {status}" + (": the token or password is not right" if status in ("401", "403") else "")
    for sign, words in TROUBLES.items():
        if sign in text:
            return words
    line = text.splitlines()[0]
    for name in SECRETS:
        if value := os.environ.get(name):
            line = line.replace(value, f"${name}")
    return line[:300]


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


def sync() -> int:
    """Send what the store does not have, of every run of this workspace, the oldest first; gives their number.

    Raises:
        UserError: the store refuses runs, which are named, or does not answer; all that it took is there.
    """
    mirror = Mirror(store(), SYNC_TIMEOUT)
    keys = [path.parent.name for path in (workspace() / ".journal").glob("*/journal.jsonl")]
    starts = {key: next((record["time"] for record in Journal(key).records()), None) for key in keys}
    keys = sorted((key for key in keys if starts[key] is not None), key=lambda key: (starts[key], key))
    refused = []
    for key in keys:
        before = mirror.sent
        try:
            _send_patiently(mirror, Journal(key))
        except Exception as error:
            refused.append(f"{mirror.place}: run {key[:8]} could not be sent: {reason(error)}")
            if not _final(error):
                break
        if mirror.sent > before:
            print(f"minigpt: run {key[:8]}: {mirror.sent - before} records sent")
    if refused:
        raise UserError("\nminigpt: ".join(refused))
    return len(keys)


def _send_patiently(mirror: Mirror, journal: Journal) -> None:
    """Send a journal; where the store is away for a moment, try again, RETRIES times without any progress."""
    tries = 0
    while True:
        before = mirror.sent
        try:
            mirror.send(journal, check=True)
            return
        except Exception as error:
            tries = 0 if mirror.sent > before else tries + 1
            if tries > RETRIES or _final(error):
                raise
            time.sleep(PAUSE * 2 ** max(0, tries - 1))


def _final(error: Exception) -> bool:
    """Whether the store has answered, and will give the same answer again."""
    if isinstance(error, UserError):
        return True
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= int(status) < 500 and status != 429


def _main() -> None:
    if sys.argv[1:] != ["sync"]:
        raise UserError("usage: python -m minigpt.tracking sync")
    print(f"minigpt: {sync()} runs are in {Mirror(store()).place}")


if __name__ == "__main__":
    run(_main)
