import json

import numpy as np
import pytest
import yaml
from helpers.experiments import results_folder, two_losses

from minigpt.comparison import tables
from minigpt.comparison.experiment import Experiment, Folder
from minigpt.errors import UserError
from minigpt.evaluation.paired import Estimate


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def pair(tmp_path):
    first, second = two_losses()
    return [
        Experiment("first", Folder(results_folder(tmp_path / "first", first))),
        Experiment("second", Folder(results_folder(tmp_path / "second", second, model={"n_embd": 512}))),
    ]


def test_comparison_shows_changed_params_losses_and_the_paired_difference(pair):
    lines = tables.comparison(pair).splitlines()
    assert [line.split() for line in lines if line.startswith(("model.", "train."))] == [["model.n_embd", "128", "512"]]
    (loss,) = [line for line in lines if line.startswith("validation loss")]
    assert f"{pair[0].val_loss:.4f} ± 0.0" in loss
    assert "run of first" in lines[1]
    (verdict,) = [line for line in lines if "better" in line]
    assert verdict.startswith("second is better than first by 0.0")
    assert "nats (95 % interval 0.0" in verdict


@pytest.mark.parametrize("first", ["a", "a" * 50])  # after the others, or on lines of its own
def test_long_last_column_is_wrapped_and_never_cut_off(monkeypatch, first):
    monkeypatch.setenv("COLUMNS", "60")
    changed = " ".join(f"name_{number}=value" for number in range(20))
    lines = tables.align([["name", "changed params"], [first, changed]], left=(0, 1))
    assert max(map(len, lines)) <= 60
    assert " ".join(lines).split() == ["name", "changed", "params", first, *changed.split()]


def test_code_that_differs_is_listed_by_its_digests(pair):
    for each, digest in zip(pair, ("1234567890", "abcdef0123"), strict=True):
        deps = [{"path": "data/prepared", "md5": digest}, {"path": "minigpt/ops.py", "md5": digest}]
        deps.append({"path": "minigpt/model.py", "md5": "0"})
        (each.files.root / "dvc.lock").write_text(json.dumps({"stages": {"train": {"deps": deps}}}))
    rows = [line.split() for line in tables.comparison(pair).splitlines()]
    assert [row for row in rows if row and "/" in row[0]] == [["minigpt/ops.py", "1234567", "abcdef0"]]


def test_table_of_many_experiments_fits_into_the_terminal(tmp_path, monkeypatch):
    losses, _ = two_losses()
    chosen = []
    for number in range(7):
        changes = {"model": {"n_embd": 100 + number}, "train": {"learning_rate": 0.01 * (number + 1), "seed": number}}
        folder = results_folder(tmp_path / f"a long name {number}" / "deep", losses + number, **changes)
        chosen.append(Experiment(f"experiment-with-a-long-name-{number}", Folder(folder)))
    monkeypatch.setenv("COLUMNS", "80")
    lines = tables.comparison(chosen).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("validation loss") for line in lines) > 1
    assert sum("is better than" in line for line in lines) == 6  # with the best one alone


@pytest.mark.parametrize(
    "estimate, sentence",
    [
        (Estimate(-0.02, 0.004), "b is better than a by 0.0200 ± 0.0040 nats (95 % interval 0.0116 to 0.0284)"),
        (Estimate(0.02, 0.004), "a is better than b by 0.0200 ± 0.0040 nats (95 % interval 0.0116 to 0.0284)"),
        (
            Estimate(0.002, 0.004),
            "a, b: no significant difference (0.0020 ± 0.0040 nats, 95 % interval -0.0064 to 0.0104)",
        ),
        (Estimate(0.0, 0.0), "a, b: every character has the same loss"),
        (Estimate(0.1, float("nan")), "a, b: +0.1000 nats; the text is too short to say whether this is luck"),
    ],
)
def test_verdict_is_one_plain_sentence(estimate, sentence):
    assert tables.verdict("a", "b", estimate) == sentence


def test_experiments_on_different_texts_are_not_compared(tmp_path, pair):
    other = results_folder(tmp_path / "other", two_losses()[0], text="another text")
    with pytest.raises(UserError, match=r"^first and other: the validation texts differ"):
        tables.comparison([pair[0], Experiment("other", Folder(other))])


def test_seeds_are_grouped_with_mean_and_deviation(tmp_path):
    losses, _ = two_losses()
    chosen = []
    for number, shift in enumerate((0.0, 0.1, 0.3, 0.5)):
        changes = {"model": {"n_embd": 512}} if number == 3 else {}
        folder = results_folder(tmp_path / str(number), losses + shift, seed=number, **changes)
        chosen.append(Experiment(f"e{number}", Folder(folder)))
    lines = tables.comparison(chosen, seeds=True).splitlines()
    mean = float(np.mean([each.val_loss for each in chosen[:3]]))
    assert lines[1].split() == ["e0", "and", "2", "more", f"{mean:.4f}", "±", "0.1528", "3", "best"]
    assert lines[2].split() == ["e3", f"{chosen[3].val_loss:.4f}", "1", "one", "seed", "n_embd=512"]


def test_groups_of_seeds_are_compared_although_a_single_training_is_the_lowest(tmp_path):
    chosen = []
    for number, (width, shift) in enumerate([(64, 0.0), (128, 0.1), (128, 0.11), (512, 0.3), (512, 0.31)]):
        folder = results_folder(tmp_path / str(number), two_losses()[0] + shift, seed=number, model={"n_embd": width})
        chosen.append(Experiment(f"e{number}", Folder(folder)))
    lines = tables.comparison(chosen, seeds=True).splitlines()
    assert "one seed" in lines[1]
    assert "best" in lines[2].split()
    assert "+0.2000 ± 0.0071" in lines[3]


@pytest.mark.parametrize(
    "first, second, shown",
    [
        ([1.0, 1.2, 1.4], [2.0, 2.2, 2.4], "+1.0000 ± 0.1633"),  # 6.1 standard errors, and 4.3 are needed
        ([1.0, 1.2, 1.4], [1.5, 1.7, 1.9], "= +0.5000 ± 0.1633"),
        ([1.0, 1.2], [1.5, 1.7, 1.9], "= +0.6000 ± 0.1528"),  # one degree of freedom
        ([1.0], [1.5, 1.7], "one seed"),
    ],
)
def test_difference_of_means_over_seeds_is_luck_unless_its_interval_excludes_0(first, second, shown):
    assert tables.mean_difference(first, second) == shown


def test_changes_name_the_section_only_where_a_name_is_ambiguous():
    before = {"train.seed": 1, "sample.seed": 1, "model.n_embd": 2, "model.bias": False, "sample.stop": []}
    after = {"train.seed": 2, "sample.seed": 1, "model.n_embd": 3, "model.bias": True, "data.split": "end"}
    assert tables.changes(before, after) == "train.seed=2 n_embd=3 bias=true stop=- split=end"
    assert tables.changes(before, before) == ""


@pytest.mark.parametrize("seconds, text", [(0.71, "0.71 s"), (92, "92 s"), (222, "3.7 min"), (7200, "2 h"), ("", "")])
def test_times_have_a_unit(seconds, text):
    assert tables.duration(seconds) == text


def test_test_loss_is_reported_before_the_validation_loss(pair, monkeypatch):
    for each, loss in zip(pair, (1.25, 1.5), strict=True):
        path = each.files.root / "results/evaluate/metrics.json"
        test = {"loss": loss, "standard_error": 0.01, "characters": 9}
        path.write_text(json.dumps({"test": test} | json.loads(path.read_text())))
    lines = tables.comparison(pair).splitlines()
    names = [line[:15].strip() for line in lines]
    row = names.index("test loss")
    assert names[row + 1] == "validation loss"
    assert "MLflow ID" not in names  # no run of these is in a store
    assert lines[row].split()[2:] == ["1.2500", "±", "0.0100", "1.5000", "±", "0.0100"]
    monkeypatch.setattr(tables, "_known", lambda: (list(pair), []))
    monkeypatch.chdir(pair[0].files.root)
    header, best, other = tables.overview().splitlines()[:3]
    assert header.split()[:4] == ["experiment", "test", "loss", "loss"]
    assert best.split()[:4] == ["second", "1.5000", "±", "0.0100"]  # the order is that of the validation loss
    assert other.split()[:4] == ["first*", "1.2500", "±", "0.0100"]


def test_one_result_is_listed_once_with_all_its_names_and_another_text_is_named(tmp_path, pair, monkeypatch):
    copy = Experiment("gyral-snob", pair[0].files)
    other = Experiment("songs", Folder(results_folder(tmp_path / "other", two_losses()[0] + 1, text="another text")))
    earlier = [Experiment(name, files) for name, files in (("f603e44", other.files), ("aaaaaaa", pair[0].files))]
    monkeypatch.setattr(tables, "experiments", lambda: iter([copy, pair[1]]))
    monkeypatch.setattr(tables, "committed", lambda: iter(earlier))
    monkeypatch.setattr(tables, "git", lambda *arguments: "main" if arguments[0] == "symbolic-ref" else "a" * 40)
    monkeypatch.setattr(tables, "Revision", lambda commit: pair[0].files)
    monkeypatch.chdir(pair[0].files.root)
    lines = tables.overview().splitlines()
    names = [line.split("  ")[0] for line in lines[1:5]]
    assert names == ["second", "main, gyral-snob*", "", "f603e44"]
    assert [" best " in line for line in lines[1:5]] == [True, False, False, True]
    assert tables.OTHER_TEXT in lines[5:]


def test_results_whose_text_is_unknown_have_no_best(tmp_path, pair):
    unknown = []
    for seed in (1, 2):
        folder = results_folder(tmp_path / str(seed), two_losses()[0], seed=seed)
        (folder / "results/evaluate/losses.npz").unlink()
        unknown.append(Experiment(f"unknown {seed}", Folder(folder)))
    shown = tables.seed_table([[pair[0]], [unknown[0]], [unknown[1]]], pair[0].params).splitlines()
    cells = {line.split("  ")[0]: line.split()[1:] for line in shown if line}
    assert tables.BEST in cells["first"]
    assert not {tables.BEST, "one"} & {*cells["unknown 1"], *cells["unknown 2"]}


def test_experiments_on_one_text_are_listed_together():
    rows = [("a", 3), ("b", 2), ("a", 1), ("b", 4)]
    assert tables._by_text(rows, lambda row: row[0], lambda row: row[1]) == [("a", 1), ("a", 3), ("b", 2), ("b", 4)]


def test_difference_to_the_best(tmp_path, pair):
    same, without = (results_folder(tmp_path / name, two_losses()[0]) for name in ("same", "without"))
    (without / "results/evaluate/losses.npz").unlink()
    shown = [tables._to_best(pair[0], each) for each in (Experiment("same", Folder(same)), pair[1])]
    assert shown[0] == "same losses"
    assert shown[1].startswith("-0.0")
    assert tables._to_best(pair[0], Experiment("without", Folder(without))) == ""


def test_seed_counts_once_and_another_text_is_another_group(tmp_path):
    losses, _ = two_losses()
    chosen = []
    for name, seed, text in (("now", 1, "a"), ("before", 1, "a"), ("second", 2, "a"), ("other", 3, "b")):
        chosen.append(Experiment(name, Folder(results_folder(tmp_path / name, losses, text=text, seed=seed))))
    groups = [[each.name for each in group] for group in tables.group_by_seed(chosen)]
    assert groups == [["now", "second"], ["other"]]


def test_seeds_of_different_code_are_not_pooled(tmp_path):
    chosen = []
    for seed, digest in ((1, "a"), (2, "a"), (3, "b")):
        folder = results_folder(tmp_path / str(seed), two_losses()[0], seed=seed)
        deps = [{"path": "minigpt/model.py", "md5": digest}]
        (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"deps": deps}}}))
        chosen.append(Experiment(str(seed), Folder(folder)))
    assert [[each.name for each in group] for group in tables.group_by_seed(chosen)] == [["1", "2"], ["3"]]
    assert "Rows with equal params are of different code" in tables.comparison(chosen, seeds=True)


def test_seeds_of_single_trainings_name_the_missing_step(pair):
    assert "`dvc exp run --temp -S train.seed=2` adds one" in tables.comparison(pair, seeds=True)
