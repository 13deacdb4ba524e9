"""Tables of experiments for a terminal."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from minigpt import params
from minigpt.comparison.experiment import NOT_FROM_LOCK, Experiment, Folder, Revision, committed, experiments
from minigpt.errors import UserError
from minigpt.evaluation import paired
from minigpt.evaluation.paired import Estimate
from minigpt.git import git

Row = TypeVar("Row")

COLUMNS = 60, 100, 120
"""Columns of a table: at least, without a terminal, and at most."""

NARROWEST = 20
"""Columns of the last column of a table, at least. With less room, it has lines of its own."""

INDENT = 4
"""Columns before the last column of a table if it has lines of its own."""

MAX_PAIRS = 10
"""Pairs that are compared with each other; of more, only those with the best experiment."""

STUDENT_BY_DEGREES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Standard errors on either side in a 95 % interval, for 1, 2, ... degrees of freedom; the last for more, too."""

SEED = "train.seed"
BEST = "best"
MEANING = "After ±: standard error of the loss or of the difference, for text like the validation split."
ABOUT_MODELS = "Verdicts are about these trained models; --seeds shows how much the seed alone changes a loss."
LUCK = '"=" before a difference: its 95 % interval includes 0, so it may be luck.'
OTHER_TEXT = "Below an empty line: another text, or an unknown one. Such losses cannot be compared."


def overview(seeds: bool = False) -> str:
    """Return a table of the experiments of this workspace, the lowest validation loss first."""
    rows, without = _known()
    workspace = Experiment("workspace", Folder(Path()))
    if not rows and not workspace.is_from_lock:
        raise UserError(f"workspace: {NOT_FROM_LOCK}")
    if not rows:
        raise UserError("no experiment has results yet; `dvc repro` or `dvc exp run` makes one")
    reference = committed_params("HEAD") or rows[0].params
    if seeds:
        return seed_table(group_by_seed(rows), reference)
    rows = _by_text(rows, _text, lambda each: each.val_loss if each.val_loss is not None else math.inf)
    here = _identity(workspace) if workspace.is_from_lock else None
    tested = any("test" in each.metrics("evaluate") for each in rows)
    names = ["experiment", "test loss", "loss", "to the best", "parameters", "time", "changed params"]
    table = [names if tested else [names[0], *names[2:]]]
    best = rows[0]
    for each in rows:
        if _text(each) != _text(best):
            best = each
            table.append([])
        mark = "*" if _identity(each) == here and each.name != "workspace" else ""
        train = each.metrics("train")
        table.append([
            each.name + mark, *([_loss(each, "test")] if tested else []), _loss(each),
            BEST if each is best and _text(best) else _to_best(best, each),
            _count(train.get("parameters")), duration(train.get("train_seconds")), changes(reference, each.params),
        ])  # fmt: skip
    notes = [MEANING, *([LUCK] if any(cell.startswith("= ") for row in table for cell in row) else []), ABOUT_MODELS]
    if [] in table:
        notes.append(OTHER_TEXT)
    if any(row and row[0].endswith("*") for row in table):
        notes.append("* has the results in the workspace.")
    if not workspace.is_from_lock:
        notes.append(f"Not listed: the workspace; {NOT_FROM_LOCK}.")
    if without:
        notes.append(f"Without results here: {', '.join(without)}. `dvc exp pull` or `dvc pull` may bring them.")
    if tested:
        notes.append("The order follows the validation loss. Choose by it, and report the test loss of your choice.")
    return "\n".join([*align(table, left=(0, len(table[0]) - 1)), "", *map(_fill, notes)])


def _known() -> tuple[list[Experiment], list[str]]:
    """Return the results that are known here, each once with all its names, and names of experiments without results.

    They are those of the current commit, the experiments, the workspace, and earlier commits. An earlier commit is
    named only if no other name leads to its result.
    """
    tried = list(experiments())
    named = [*tried, Experiment("workspace", Folder(Path()))]
    if commit := git("rev-parse", "--verify", "--quiet", "HEAD"):
        branch = git("symbolic-ref", "--short", "--quiet", "HEAD") or commit[:7]
        named.insert(0, Experiment(branch, Revision(commit)))
    found: dict[Any, Experiment] = {}
    for each in named:
        if each.val_loss is None or not each.is_from_lock:
            continue
        first = found.setdefault(_identity(each), each)
        if first is not each and each.name != "workspace":
            first.name += f", {each.name}"
    for each in committed():
        if each.val_loss is not None:
            found.setdefault(_identity(each), each)
    return list(found.values()), [each.name for each in tried if each.val_loss is None]


def _identity(experiment: Experiment) -> Any:
    """Return a value that is equal for copies of one result."""
    run = experiment.run.get("run")
    return run, experiment.val_loss, tuple(sorted((name, str(value)) for name, value in experiment.params.items()))


def committed_params(revision: str) -> dict[str, Any]:
    """Return the params of a git revision by dotted name, empty without git."""
    text = git("show", f"{revision}:./params.yaml")
    tree = params.read_yaml(text, f"{revision}:params.yaml") if text else None
    return params.flatten(tree) if isinstance(tree, dict) else {}


def comparison(chosen: Sequence[Experiment], seeds: bool = False) -> str:
    """Return the params that differ, the losses, and the paired difference of each pair; or with ``seeds`` the groups.

    Raises:
        UserError: an experiment has no results, or two were not measured on the same text.
    """
    if seeds:
        require_losses(chosen)
        return seed_table(group_by_seed(chosen), chosen[0].params)
    results, keys = result_rows(chosen)
    lines = _in_parts([["", *(each.name for each in chosen)], *results, *([[]] if keys else []), *keys])
    return "\n".join([*lines, "", *map(_fill, verdicts(chosen)), "", *map(_fill, (MEANING, ABOUT_MODELS))])


def require_losses(chosen: Sequence[Experiment]) -> None:
    """Raise a UserError if an experiment has no validation loss, or its results are not those of dvc.lock."""
    for each in chosen:
        if not each.is_from_lock:
            raise UserError(f"{each.name}: {NOT_FROM_LOCK}")
        if each.val_loss is None:
            raise UserError(f"{each.name}: no validation loss; `dvc repro evaluate` or `dvc pull` brings its results")


def result_rows(chosen: Sequence[Experiment]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the results, and the params and code that differ, as rows of a name and one cell for each experiment.

    A row without any value is left out.
    """
    require_losses(chosen)
    rows = differing([each.params for each in chosen])
    keys = [[name, *map(_value, values)] for name, values in rows.items()]
    code = differing([each.code for each in chosen]) if all(each.code for each in chosen) else {}
    keys += [[path, *(str(digest or "-")[:7] for digest in digests)] for path, digests in code.items()]
    trained, measured = ([each.metrics(stage) for each in chosen] for stage in ("train", "evaluate"))
    tested = any("test" in metrics for metrics in measured)
    results = [
        ["MLflow run", *(str(each.run.get("name") or "") for each in chosen)],
        ["MLflow ID", *(each.run_id[:12] for each in chosen)],
        *([["test loss", *(_loss(each, "test") for each in chosen)]] if tested else []),
        ["validation loss", *map(_loss, chosen)],
        ["training loss", *(_digits(metrics.get("train", {}).get("loss")) for metrics in measured)],
        ["best step", *(_count(metrics.get("best_step")) for metrics in trained)],
        ["parameters", *(_count(metrics.get("parameters")) for metrics in trained)],
        ["weights, digest", *(each.weights[:7] for each in chosen)],
        ["training time", *(duration(metrics.get("train_seconds")) for metrics in trained)],
    ]
    return [row for row in results if any(row[1:])], keys


def verdicts(chosen: Sequence[Experiment]) -> list[str]:
    """Return one sentence on each pair."""
    pairs = list(itertools.combinations(chosen, 2))
    if len(pairs) > MAX_PAIRS:
        best = min(chosen, key=lambda each: math.inf if each.val_loss is None else each.val_loss)
        pairs = [(best, each) for each in chosen if each is not best]
    return [compare_pair(first, second) for first, second in pairs]


def compare_pair(first: Experiment, second: Experiment) -> str:
    """Return a sentence on the difference of two experiments.

    Raises:
        UserError: they were not measured on the same text.
    """
    try:
        estimate = paired.difference(first.losses, second.losses)
    except UserError as error:
        raise UserError(f"{first.name} and {second.name}: {error}") from None
    return verdict(first.name, second.name, estimate)


def verdict(first: str, second: str, estimate: Estimate) -> str:
    """Return a sentence on the paired difference of two losses, that of the second minus that of the first."""
    if math.isnan(estimate.standard_error):
        return f"{first}, {second}: {estimate.value:+.4f} nats; the text is too short to say whether this is luck"
    if estimate == Estimate(0, 0):
        return f"{first}, {second}: every character has the same loss"
    size = f"{abs(estimate.value):.4f} ± {estimate.standard_error:.4f} nats"
    low, high = (abs(estimate.value) + side * estimate.margin for side in (-1, 1))
    interval = f"95 % interval {low:.4f} to {high:.4f}"
    if not estimate.significant:
        return f"{first}, {second}: no significant difference ({size}, {interval})"
    better, worse = (second, first) if estimate.value < 0 else (first, second)
    return f"{better} is better than {worse} by {size} ({interval})"


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of the params that are not the same in all experiments."""
    names = dict.fromkeys(name for each in settings for name in each)
    rows = {name: [each.get(name) for each in settings] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def changes(reference: dict[str, Any], changed: dict[str, Any]) -> str:
    """Return the params that differ from those of ``reference``, as ``n_embd=512 train.seed=2``."""
    sections = Counter(name.rpartition(".")[2] for name in reference)
    return " ".join(
        f"{name if sections[name.rpartition('.')[2]] > 1 else name.rpartition('.')[2]}={_value(new)}"
        for name, (_, new) in differing([reference, changed]).items()
    )


def group_by_seed(chosen: Iterable[Experiment]) -> list[list[Experiment]]:
    """Return groups of experiments on one text, of one code, that differ only in ``train.seed``.

    Of each seed, the first counts.
    """
    groups: dict[Any, dict[Any, Experiment]] = {}
    for each in chosen:
        code = tuple(sorted(each.code.items()))
        groups.setdefault((*_text_and_params(each), code), {}).setdefault(each.params.get(SEED), each)
    return [list(group.values()) for group in groups.values()]


def _text_and_params(experiment: Experiment) -> tuple[str, Any]:
    """Return the digest of the validation text, and the params except for the seed."""
    values = experiment.params.items()
    return _text(experiment), tuple(sorted((name, str(value)) for name, value in values if name != SEED))


def _by_text(rows: Sequence[Row], text: Callable[[Row], str], loss: Callable[[Row], float]) -> list[Row]:
    """Return rows with those of one text together, the lowest loss first."""
    lowest: dict[str, float] = {}
    for row in sorted(rows, key=loss):
        lowest.setdefault(text(row), loss(row))
    return sorted(rows, key=lambda row: (lowest[text(row)], text(row), loss(row)))


def seed_table(groups: list[list[Experiment]], reference: dict[str, Any]) -> str:
    """Return a table of groups of trainings that differ only in their seed: the lowest mean loss first.

    Differences are to the best group of several seeds: one training may be the lowest by luck.
    """
    pairs = [([each.val_loss for each in group if each.val_loss is not None], group) for group in groups]
    pairs = _by_text(pairs, lambda pair: _text(pair[1][0]), lambda pair: statistics.mean(pair[0]))
    table = [["experiments", "mean loss", "seeds", "to the best", "changed params"]]
    best: dict[str, Any] = {}
    for pair in sorted(pairs, key=lambda pair: len(pair[0]) == 1):
        best.setdefault(_text(pair[1][0]), pair)
    last = _text(pairs[0][1][0])
    for pair in pairs:
        found, group = pair
        text = _text(group[0])
        if text != last:
            last = text
            table.append([])
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        setting, others = (
            {name: value for name, value in values.items() if name != SEED} for values in (group[0].params, reference)
        )
        name = group[0].name if len(group) == 1 else f"{group[0].name.split(', ')[0]} and {len(group) - 1} more"
        difference = BEST if pair is best[text] else mean_difference(best[text][0], found)
        mean = f"{statistics.mean(found):.4f}{spread}"
        table.append([name, mean, str(len(group)), difference if text else "", changes(others, setting)])
    notes = [
        "After ± of a loss: standard deviation over the seeds. After ± of a difference: its standard error.",
        '"=" before a difference: it may be the luck of the seeds. "one seed": too few for a difference; take three.',
        *([OTHER_TEXT] if [] in table else []),
    ]
    if len({_text_and_params(group[0]) for group in groups}) < len(groups):
        notes.append("Rows with equal params are of different code; `minigpt compare A B` lists the files.")
    if all(len(group) == 1 for group in groups):
        notes = [
            "No two trainings differ only in their seed. `dvc exp run --temp -S train.seed=2` adds one; take three."
        ]
    return "\n".join([*align(table, left=(0, len(table[0]) - 1)), "", *map(_fill, notes)])


def mean_difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Return the difference of two mean losses in nats, with Welch's standard error, which a single seed cannot have.

    It begins with "=" unless the 95 % interval excludes 0. That interval has the degrees of freedom of the smaller
    group, fewer than Welch's approximation (1947, The generalization of "Student's" problem, Biometrika 34).
    """
    seeds = min(len(first), len(second))
    if seeds < 2:
        return "one seed"
    difference = statistics.mean(second) - statistics.mean(first)
    error = math.sqrt(sum(statistics.variance(losses) / len(losses) for losses in (first, second)))
    limit = STUDENT_BY_DEGREES[min(seeds - 1, len(STUDENT_BY_DEGREES)) - 1]
    return f"{'' if abs(difference) > limit * error else '= '}{difference:+.4f} ± {error:.4f}"


def _to_best(best: Experiment, other: Experiment) -> str:
    """Return the paired difference of two losses on one text, or nothing if it cannot be computed."""
    with suppress(UserError):
        estimate = paired.difference(best.losses, other.losses)
        if estimate == Estimate(0, 0):
            return "same losses"
        if math.isfinite(estimate.standard_error):
            sign = "" if estimate.significant else "= "
            return f"{sign}{estimate.value:+.4f} ± {estimate.standard_error:.4f}"
    return ""


def _text(experiment: Experiment) -> str:
    """Return the digest of the validation text, empty if the losses of its characters are missing."""
    with suppress(UserError):
        return experiment.losses.text
    return ""


def _loss(experiment: Experiment, split: str = "val") -> str:
    metrics = experiment.metrics("evaluate").get(split, {})
    error = metrics.get("standard_error")
    return _digits(metrics.get("loss")) + (f" ± {error:.4f}" if isinstance(error, int | float) else "")


def _digits(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def duration(seconds: Any) -> str:
    """Return a time with its unit."""
    if not isinstance(seconds, int | float):
        return ""
    for limit, size, unit in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())


def columns() -> int:
    """Return the width of a table: that of the terminal, within COLUMNS."""
    least, default, most = COLUMNS
    return max(least, min(most, shutil.get_terminal_size((default, 24)).columns))


def align(table: list[list[str]], left: tuple[int, ...]) -> list[str]:
    """Return the rows of a table as lines.

    The columns in ``left`` are aligned on the left. If ``left`` has the last column, it is wrapped, on lines of its own
    if it does not fit after the others; otherwise it is shortened.
    """
    width, sizes = columns(), [max(len(row[column]) for row in table if row) for column in range(len(table[0]))]
    used = sum(sizes[:-1]) + 2 * (len(sizes) - 1)
    wrap, fits = len(sizes) - 1 in left, width - used >= min(NARROWEST, sizes[-1])
    sizes[-1] = min(sizes[-1], max(NARROWEST, width - used) if fits or not wrap else width - INDENT)
    lines = []
    for row in table:
        *cells, last = row or [""]
        parts = textwrap.wrap(last, sizes[-1], break_long_words=False, break_on_hyphens=False)
        first, *others = (parts or [""]) if wrap else [shorten(last, sizes[-1])]
        if wrap and not fits:
            first, others = "", [first, *others] if last else []
        aligned = [
            cell.ljust(size) if column in left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip([*cells, first], sizes, strict=False))
        ]
        lines.append("  ".join(aligned).rstrip())
        lines += [" " * (used if fits else INDENT) + other for other in others]
    return lines


def _fill(sentence: str) -> str:
    return textwrap.fill(sentence, columns(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _in_parts(table: list[list[str]]) -> list[str]:
    """Return a table with one column per experiment, in several parts below each other if it is too wide."""
    names, *rest = (list(column) for column in itertools.zip_longest(*table, fillvalue=""))
    widest = (columns() - NARROWEST) // 2  # so that two fit
    rest = [[shorten(cell, widest) for cell in column] for column in rest]
    size, lines = max(map(len, names)) + 2, list[str]()
    while rest:
        part, used = list[list[str]](), size
        while rest and (not part or used + max(map(len, rest[0])) <= columns()):
            used += max(map(len, rest[0])) + 2
            part.append(rest.pop(0))
        rows = [list(row) for row in zip(names, *part, strict=True)]
        lines += [*align(rows, left=(0,)), *([""] if rest else [])]
    return lines


def shorten(text: str, size: int) -> str:
    """Return ``text``, with an ellipsis if it has more than ``size`` characters."""
    return text if len(text) <= size else text[: max(0, size - 1)] + "…"
