"""Summary of the results of all stages, for a terminal of 80 columns."""

import csv
import itertools
import math
import os
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt import params
from minigpt.comparison.experiment import NOT_FROM_LOCK, Experiment, Folder
from minigpt.comparison.tables import changes, committed_params, shorten
from minigpt.errors import UserError
from minigpt.evaluation.paired import MIN_CHARACTERS, Estimate
from minigpt.files import read_run_key, require_json, workspace
from minigpt.git import git
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import local_store_uri, resolve_tracking_uri
from minigpt.tracking.uploader import Uploader

FILES = [
    "train/metrics.json", "train/history.csv", "evaluate/metrics.json", "sample/metrics.json", "sample/samples.txt",
]  # fmt: skip


LABEL = " " * 20
"""Start of a line that continues the one before."""

MAX_FILES = 5
"""Lines with the losses of single files."""


def summarize(model: Path, results: Path, next_steps: bool = True) -> str:
    """Return the summary of the stages that wrote to the folders ``model`` and ``results``."""
    for name in FILES:
        if not (results / name).is_file():
            raise UserError(f"{results / name}: no such file; `dvc repro` writes it")
    try:
        return _summary(model, results, next_steps) + (_next_steps() if next_steps else "")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, StopIteration, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{results}: damaged ({reason}); `dvc checkout --force dvc.yaml` restores the files") from None


def _summary(model: Path, results: Path, next_steps: bool) -> str:
    settings = params.load()
    used = Experiment("workspace", Folder(Path())) if next_steps else None
    train, evaluation, sample = (
        require_json(results / stage / "metrics.json", "metrics") for stage in ("train", "evaluate", "sample")
    )
    val, copied, held_out = evaluation["val"], sample["memorized"], sample["held_out"]
    with (results / "train" / "history.csv").open(newline="", encoding="utf-8") as file:
        untrained = float(next(csv.DictReader(file))["val_loss"])
    sample_lines = filter(str.strip, (results / "sample" / "samples.txt").read_text(encoding="utf-8").split("\n")[1:])
    excerpt = "\n".join(f"  | {line[:75]}" for line in itertools.islice(sample_lines, 12))
    uri = Uploader(resolve_tracking_uri()).display_uri
    local = uri == local_store_uri()
    minutes, seconds = divmod(round(train["train_seconds"]), 60)
    return f"""
{_source(results / "train" / "run.json", used, settings.data.source)}\
  {train["parameters"]:,} parameters, {train["steps"]:,} steps in {minutes} min {seconds:02} s

{_verdict(train, evaluation)}{_changed(settings, used)}
{_loss("test loss", evaluation["test"]) if "test" in evaluation else ""}{_loss("validation loss", val)}\
                    before training: {untrained:.4f} nats
{_by_file(results / "evaluate" / "files.csv")}\
  training loss     {_training_loss(evaluation["train"])} nats at the best step, {train["best_step"]:,}
  calibration error {val["calibration_error"]:.4f}; the most likely character is correct in {val["accuracy"]:.1%}
  copied            at most {copied["longest_run"]} characters, {copied["share_of_8_grams"]:.0%} of 8-grams
                    held-out text: {held_out["longest_run"]} characters, {held_out["share_of_8_grams"]:.0%} of 8-grams

{excerpt}

{_place()}  model     {model}/
  sample    {results}/sample/samples.txt
  page      {results}/sample/page.html: the model in a web page (make page)
  metrics   {results}/evaluate/metrics.json, {results}/train/history.csv
  charts    dvc plots show
  runs      {"mlflow.db" if local else uri}
{_run_ids(results / "train" / "run.json", uri)}"""


def _source(record: Path, used: Experiment | None, current: str) -> str:
    """Return the text of the run that a file run.json names; and a line if the results are of another text or params.

    ``used`` is the experiment with these results in ``dvc.lock``, None during a stage.
    """
    source = current
    with suppress(UserError):  # copied results may have no such file
        source = require_json(record, "a run").get("source", current)
    warning = ""
    if source != current:
        warning = f"not {current}, the text in params.yaml: `dvc checkout dvc.yaml` or `dvc repro` brings its results"
    elif used and not used.is_from_lock:
        warning = NOT_FROM_LOCK
    return f"  {source}\n" + (textwrap.indent(textwrap.fill(warning, 78), "  ") + "\n" if warning else "")


def _loss(label: str, metrics: dict[str, Any]) -> str:
    """Return the exact loss of a split as two lines."""
    error = f", standard error {metrics['standard_error']:.2g}" if "standard_error" in metrics else ""
    return (
        f"  {label:<18}{metrics['loss']:.4f} nats, {metrics['bits_per_character']:.4f} bits per character\n"
        f"{LABEL}exact over {metrics['characters']:,} characters{error}\n"
    )


def _training_loss(metrics: dict[str, Any]) -> str:
    """Return the loss of the training split, with the error of the sample if it is one."""
    error = metrics.get("sampling_error")
    return f"{metrics['loss']:.4f}" + (f" ± {error:.4f}" if error else "")


def _place() -> str:
    """Return how to get the files of an experiment that ran in a copy of the workspace, as a line; nothing without."""
    if workspace() == Path.cwd():
        return ""
    return (
        f"  Not in this folder yet: dvc exp apply {os.environ.get('DVC_EXP_NAME', 'NAME')} brings these files here.\n\n"
    )


def _by_file(path: Path) -> str:
    """Return the losses of the files of a text, the highest first, as at most MAX_FILES lines; nothing for one file."""
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    split = rows[0]["split"]  # the test split if it has text of several files
    rows = sorted((row for row in rows if row["split"] == split), key=lambda row: -float(row["loss"]))
    shown = rows if len(rows) <= MAX_FILES else rows[: MAX_FILES - 1]
    lines = []
    for row in shown:
        name = "".join(character if character.isprintable() else "?" for character in row["file"])
        error = f" ± {float(row['standard_error']):.4f}" if row["standard_error"] else ""
        lines.append(f"{float(row['loss']):.4f}{error:9} nats  {shorten(name, 36)}".rstrip())
    if len(shown) < len(rows):
        lines.append(f"and {len(rows) - len(shown):,} files with lower losses: {path}")
    label = f"  {'test ' if split == 'test' else ''}loss by file".ljust(len(LABEL))
    return label + f"\n{LABEL}".join(lines) + "\n"


def _run_ids(record: Path, uri: str) -> str:
    """Return MLflow's IDs of the run that a file run.json names, as lines; with the store if it is not ``uri``."""
    ids = dict[str, str]()
    with suppress(OSError, ValueError):
        ids = Journal(read_run_key(record)).mlflow_ids()
    return "".join(f"  MLflow ID {name}{'' if store == uri else f' in {store}'}\n" for store, name in ids.items())


def _verdict(train: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """Return the comparison with the best n-gram model, and signs of overfitting, as lines."""
    val, baselines = evaluation["val"], evaluation["baselines"]
    loss, name = min((loss, name) for name, loss in baselines.items() if name.endswith("gram"))
    if val.get("characters", MIN_CHARACTERS) < MIN_CHARACTERS:
        sentences = [
            f"none: {val['characters']:,} characters of validation text are too few",
            f"the best n-gram model ({name}) has {loss:.4f} nats",
            "docs/own-text.md explains how much text is enough",
        ]
        return _labelled("verdict", "; ".join(sentences))
    versus = evaluation.get("versus_ngram", {"difference": val["loss"] - loss})  # older results have none
    estimate = Estimate(versus["difference"], versus.get("standard_error") or math.nan)
    known = not math.isnan(estimate.standard_error)
    if known and not estimate.significant:
        sentences = [f"no better and no worse than the best n-gram model ({name}: {loss:.4f} nats)"]
    else:
        size = abs(estimate.value)
        comparison = "better" if estimate.value < 0 else "WORSE"
        sentences = [f"{comparison} than the best n-gram model ({name}: {loss:.4f}) by {size:.4f} nats"]
        if known:
            sentences[0] += f" (95 % interval {size - estimate.margin:.4f} to {size + estimate.margin:.4f})"
    if since := train.get("overfitting_since"):
        sentences.append(f"overfitting since step {since:,}: more training does not help")
    if estimate.value > 0 or (known and not estimate.significant):
        if train["best_step"] == train["steps"]:
            sentences.append("the last step is the best, so more train.max_iters may help")
        elif not train["best_step"]:
            sentences.append("no step has lowered the loss, so a smaller train.learning_rate may help")
        sentences.append("docs/own-text.md explains the signs")
    if known:
        sentences.append("for other trainings, see `minigpt compare`")
    return _labelled("verdict", "; ".join(sentences))


def _changed(settings: params.Params, used: Experiment | None) -> str:
    """Return the params of the results that differ from those in git, and those of params.yaml that are newer.

    During a stage, without ``used``, the results are those of ``settings``.
    """
    if used and not used.is_from_lock:
        return ""
    current = params.flatten(settings)
    results = used.params if used else current
    committed = committed_params(os.environ.get("DVC_EXP_BASELINE_REV") or "HEAD")
    lines = ""
    if changed := changes(committed, results) if committed else "":
        lines += "\n" + _labelled("changed params", f"{changed} (compared with the last commit)")
    if newer := changes(results, current):
        lines += "\n" + _labelled("not run yet", f"{newer} (in params.yaml); `dvc repro` runs it")
    return lines


def _labelled(label: str, text: str) -> str:
    """Return ``text`` after a label, in lines that end between words but not within a command in backticks."""
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), text)
    lines = textwrap.fill(text, 80, initial_indent=f"  {label:<18}", subsequent_indent=LABEL, break_on_hyphens=False)
    return lines.replace("\0", " ")


def _next_steps() -> str:
    """Return commands to continue with; without the commit of the results if git has them."""
    commit = COMMIT if git("status", "--porcelain", "--", "dvc.lock", "params.yaml") else ""
    return f"""
  Next steps

    source .venv/bin/activate
{commit}\
    dvc exp run --temp -n wider -S model.n_embd=512   train a wider model
    minigpt compare                                   compare the experiments
    make ui                                           show the curves
    make shakespeare                                  train on a larger text
"""


COMMIT = """\
    git add dvc.lock params.yaml                      commit the baseline:
    git commit -m "First run"
"""
