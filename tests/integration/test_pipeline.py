"""The pipeline in a copy of the project, with DVC, its experiments and an MLflow store."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.imports import import_closure
from helpers.workspace import ROOT, SHAKESPEARE, command, make_repository, python, set_params

from minigpt import profiles
from minigpt.cli import cli
from minigpt.params import flatten, load

RECORDS_ONLY = {"tracking", "summary.py", "program.py"}
"""Parts of the library that record and show results and errors, and do not decide results."""


@pytest.mark.parametrize("stage", ["prepare", "evaluate", "sample"])
def test_stage_depends_on_the_library_files_that_decide_its_result(stage):
    imported = {file.relative_to(ROOT) for file in import_closure(f"stages/{stage}.py", without=RECORDS_ONLY)}
    imported = {path for path in imported if path.name != "__init__.py"}
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    deps = [Path(dep) for dep in stages[stage]["deps"] if dep.startswith(("minigpt/", "stages/"))]
    covered = {path for path in imported for dep in deps if path.is_relative_to(dep)}
    assert covered == imported
    assert all(any(path.is_relative_to(dep) for path in imported) for dep in deps)


def test_readme_names_only_commands_targets_and_params_that_exist():
    text = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", code, re.MULTILINE))
    assert {"page", "dagshub"} <= named <= targets
    known = set(flatten(load(ROOT / "params.yaml")))
    assert {"model.n_embd"} <= set(re.findall(r"-S '?([\w.]+)=", code)) <= known
    assert set(re.findall(r"^minigpt ([a-z-]+)", code, re.MULTILINE)) <= set(cli.commands)
    assert set(re.findall(r"^minigpt profile ([a-z-]+)", code, re.MULTILINE)) <= set(profiles.names(ROOT))


def test_drama_shares_no_long_phrase_with_tiny_shakespeare():
    text = (ROOT / "data/drama.txt").read_text()
    assert len(text) >= 120_000
    lines = [line for line in text.split("\n") if line and not re.fullmatch(r"[A-Z ]+:|\[.*|.*\]|ACT .*", line)]
    assert len(lines) == len(set(lines))
    if SHAKESPEARE is None:
        pytest.skip("Tiny Shakespeare is not available")
    runs = lambda words: {tuple(words[i : i + 8]) for i in range(len(words) - 7)}  # noqa: E731
    words = lambda written: re.findall(r"[a-z']+", written.lower())  # noqa: E731
    assert not runs(words(text)) & runs(words(SHAKESPEARE.read_text()))


def test_songs_are_in_devanagari():
    text = (ROOT / "data/songs.txt").read_text()
    assert len(text) >= 15_000
    assert set(re.sub(r"[\u0900-\u097f]", "", text)) <= set(" \n,?!-")


@pytest.fixture(scope="module")
def repository(tmp_path_factory, project_files):
    """A git repository of the project with small params after ``dvc repro``: its folder and the printed text."""
    folder = make_repository(tmp_path_factory.mktemp("pipeline") / "repository", project_files)
    return folder, repro(folder)


@pytest.fixture
def copy(repository, tmp_path):
    """A copy of the repository that a test may change."""
    return Path(shutil.copytree(repository[0], tmp_path / "copy"))


def repro(folder):
    ran = command("dvc", "repro", cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def stages_run(printed):
    return re.findall(r"^Running stage '(\w+)'", printed, re.MULTILINE)


def runs(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client, client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])


def test_dvc_repro_writes_all_outputs_and_one_run(repository):
    folder, printed = repository
    assert stages_run(printed) == ["prepare", "train", "evaluate", "sample"]
    for name in (
        "data/prepared/train.npy", "models/gpt/model.safetensors", "results/train/metrics.json",
        "results/evaluate/metrics.json", "results/evaluate/scores.json", "results/evaluate/losses.npz",
        "results/evaluate/positions.csv", "results/evaluate/context.csv", "results/evaluate/characters.csv",
        "results/evaluate/confusions.csv", "results/evaluate/calibration.csv", "results/evaluate/baselines.csv",
        "results/sample/samples.txt", "results/sample/memorized.csv", "results/sample/metrics.json",
        "results/sample/page.html", "results/train/samples.csv",
    ):  # fmt: skip
        assert (folder / name).stat().st_size, name
    with (folder / "results/train/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = json.loads((folder / "results/evaluate/metrics.json").read_text())
    assert [row["step"] for row in rows] == ["0", "5", "10", "12"]
    assert scores["val"]["loss"] == pytest.approx(min(float(row["val_loss"]) for row in rows), abs=1e-6)
    assert not (folder / ".checkpoints").exists() or not list((folder / ".checkpoints").iterdir())

    client, found = runs(folder)
    run = found[0].data
    assert len(found) == 1
    assert found[0].info.status == "FINISHED"
    assert run.params["model.n_layer"] == "2"
    assert run.params["sample.temperature"] == "0.8"
    assert run.metrics["results/val_loss"] == scores["val"]["loss"]
    assert {"loss/train", "loss/val", "training/learning_rate", "training/grad_norm"} <= set(run.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(run.metrics)
    assert len(run.tags["mlflow.source.git.commit"]) == 40
    assert "threads" in run.tags["device"]
    assert run.tags["throughput"].endswith("characters/s")
    assert found[0].inputs.dataset_inputs[0].dataset.name == "songs.txt"
    files = {file.path for file in client.list_artifacts(found[0].info.run_id)}
    assert {"model", "sample", "evaluate", "train", "params.yaml", "dvc.lock"} <= files
    drawn = {file.path for file in client.list_artifacts(found[0].info.run_id, "train")}
    assert drawn == {"train/history.csv", "train/loss.png", "train/samples.csv"}
    shown = {file.path for file in client.list_artifacts(found[0].info.run_id, "evaluate")}
    assert {f"evaluate/{name}" for name in ("evaluation.png", "characters.csv", "metrics.json")} <= shown
    assert {"results/calibration_error", "results/longest_copied_run"} <= set(run.metrics)
    assert {name.partition("/")[0] for name in run.metrics} == {"loss", "training", "results", "system"}
    assert run.params["parameters"] == str(
        json.loads((folder / "results/train/metrics.json").read_text())["parameters"]
    )
    assert f"**Validation loss {scores['val']['loss']:.4f}" in run.tags["mlflow.note.content"]
    assert json.loads(run.tags["mlflow.log-model.history"])[0]["artifact_path"] == "model"
    assert (run.tags["mlflow.user"], run.tags["mlflow.source.git.dirty"]) == ("test", "false")


def test_summary_shows_the_results_and_no_secret(repository):
    folder, printed = repository
    scores = json.loads((folder / "results/evaluate/metrics.json").read_text())
    ran = python("-m", "minigpt", "summary", cwd=folder)
    assert f"validation loss   {scores['val']['loss']:.4f} nats" in ran.stdout
    ngrams = scores["baselines"]
    best = min(ngrams, key=ngrams.get)
    verdict = ran.stdout[ran.stdout.index("verdict") : ran.stdout.index("validation loss")]
    assert f"verdict           WORSE than the best n-gram model ({best}: {ngrams[best]:.4f}) by " in verdict
    assert re.search(r"by \d\.\d{4} nats \(95 % interval \d\.\d{4} to \d\.\d{4}\);", " ".join(verdict.split()))
    assert "runs      mlflow.db\n" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert ran.stdout.partition("\n  Next steps")[0].strip("\n") in printed  # the last stage has shown it
    uri = "http://me:secret@mlflow.example.com"
    ran = python("-m", "minigpt", "summary", cwd=folder, MLFLOW_TRACKING_URI=uri)
    assert "runs      http://mlflow.example.com\n" in ran.stdout
    assert "secret" not in ran.stdout


def test_evaluation_reports_the_uncertainty_of_a_short_split(repository):
    folder, printed = repository
    scores = json.loads((folder / "results/evaluate/metrics.json").read_text())
    val, train, baselines = scores["val"], scores["train"], scores["baselines"]
    assert re.search(r"val: .* may differ by 0\.\d+ nats\s.* more than 1,912 characters", printed)
    assert 0.001 < val["standard_error"] < 0.2
    assert 0 < val["calibration_error"] < 1
    assert (train["characters"], train["sampling_error"]) == (train["split_characters"], 0)
    assert scores["versus_ngram"]["counted_characters"] == train["characters"] + 1
    assert baselines["uniform"] > baselines["unigram"] > baselines["2-gram"] > baselines["3-gram"] > 1.5
    with (folder / "results/evaluate/characters.csv").open(encoding="utf-8", newline="") as file:
        assert sum(int(row["count"]) for row in csv.DictReader(file)) == val["characters"]
    with (folder / "results/sample/memorized.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    text = (folder / "data/songs.txt").read_text(encoding="utf-8")
    written = (folder / "results/sample/samples.txt").read_text(encoding="utf-8")
    assert row["run"] in text
    assert row["run"] in written
    assert len(row["run"]) == int(row["longest_run"])


def test_second_repro_runs_no_stage(repository):
    assert stages_run(repro(repository[0])) == []


@pytest.mark.slow
def test_held_out_ends_of_several_files_and_a_test_split(copy):
    text = (copy / "data/songs.txt").read_text(encoding="utf-8")
    (copy / "data/mine").mkdir()
    for number, begin in enumerate((0, 6000, 12_000)):
        (copy / f"data/mine/{number}.txt").write_text(text[begin : begin + 6000], encoding="utf-8")
    set_params(copy, {"data": {"source": "data/mine", "split": "each_file", "val_fraction": 0.2, "test_fraction": 0.2}})
    printed = repro(copy)
    assert re.search(
        r"data/mine: [\d,]+ training characters, 3,6\d\d validation .*, 3,6\d\d test characters, voc", printed
    )
    metrics = json.loads((copy / "results/evaluate/metrics.json").read_text())
    scores = json.loads((copy / "results/evaluate/scores.json").read_text())
    assert next(iter(scores.items())) == ("test_loss", metrics["test"]["loss"])
    with (copy / "results/evaluate/files.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["file"]) for row in rows] == [
        (split, f"{number}.txt") for split in ("test", "val") for number in range(3)
    ]
    for split in ("test", "val"):
        own = [row for row in rows if row["split"] == split]
        assert sum(int(row["characters"]) for row in own) == metrics[split]["characters"]
        nats = sum(int(row["characters"]) * float(row["loss"]) for row in own)
        assert nats / metrics[split]["characters"] == pytest.approx(metrics[split]["loss"], rel=1e-6)
    shown = printed[printed.index("verdict") :]
    assert (
        shown.index("  test loss         ") < shown.index("  validation loss   ") < shown.index("  test loss by file ")
    )
    client, (run, *_) = runs(copy)
    assert run.data.metrics["results/test_loss"] == metrics["test"]["loss"]
    assert "**Test loss" in run.data.tags["mlflow.note.content"]
    assert "evaluate/files.csv" in {file.path for file in client.list_artifacts(run.info.run_id, "evaluate")}


def replace(folder, path, old, new):
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, old, new, reruns",
    [
        ("params.yaml", "temperature: 0.8", "temperature: 0.7", ["sample"]),
        ("minigpt/generation/generator.py", "\nfrom __future__", "\n# a comment\nfrom __future__", ["sample"]),
    ],
)
def test_change_reruns_the_stages_that_depend_on_it(copy, path, old, new, reruns):
    replace(copy, path, old, new)
    assert stages_run(repro(copy)) == reruns


@pytest.mark.parametrize(
    "name, stages",
    [
        ("minigpt/choices.py", {"prepare", "train", "evaluate", "sample"}),
        ("minigpt/training/control.py", {"train"}),
        ("minigpt/generation/generator.py", {"sample"}),
        ("minigpt/runtime/launcher.py", {"evaluate", "sample"}),
        ("minigpt/cli.py", set()),
    ],
)
def test_dvc_reruns_the_stages_that_import_an_edited_file(repository, name, stages):
    file = repository[0] / name
    source = file.read_bytes()
    file.write_bytes(source + b"# edited\n")
    status = command("dvc", "status", "--json", cwd=repository[0])
    file.write_bytes(source)
    assert status.returncode == 0, status.stderr
    assert {name for name in json.loads(status.stdout) if not name.endswith(".dvc")} == stages


@pytest.mark.slow
def test_sampled_training_split_has_a_sampling_error(copy):
    replace(copy, "params.yaml", "train_chars: 100000", "train_chars: 1000")
    assert stages_run(repro(copy)) == ["evaluate", "sample"]
    train = json.loads((copy / "results/evaluate/metrics.json").read_text())["train"]
    assert 900 < train["characters"] <= 1024 < train["split_characters"]
    assert 0 < train["sampling_error"] < 0.2


def test_experiment_is_a_row_in_dvc_and_a_run_in_mlflow(minigpt, copy):
    first = json.loads((copy / "results/train/run.json").read_text())
    for arguments in (("add", "dvc.lock"), ("commit", "--quiet", "--message", "First run")):
        assert command("git", *arguments, cwd=copy).returncode == 0
    ran = command("dvc", "exp", "run", "--name", "wider", "-S", "model.n_embd=24", cwd=copy)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert stages_run(ran.stdout + ran.stderr) == ["train", "evaluate", "sample"]
    assert "  changed params    n_embd=24 (compared with the last commit)\n" in ran.stdout
    shown = command("dvc", "exp", "show", "--csv", "--no-pager", cwd=copy).stdout
    rows = {row["Experiment"]: row for row in csv.DictReader(shown.splitlines())}
    assert rows["wider"]["model.n_embd"] == "24"
    assert float(rows["wider"]["val_loss"]) > 0
    _, found = runs(copy)
    assert len(found) == 2
    assert found[0].info.run_name == "songs 2x24 muon (wider)"
    assert found[0].data.params["model.n_embd"] == "24"
    assert found[0].data.tags["dvc.experiment"] == "wider"
    listed = minigpt("compare", cwd=copy).stdout.splitlines()
    branch = command("git", "symbolic-ref", "--short", "HEAD", cwd=copy).stdout.strip()
    assert {line.split()[0] for line in listed[1:3]} == {"wider*", branch}
    assert max(map(len, listed)) <= 100
    compared = minigpt("compare", "HEAD", "wider", cwd=copy)
    assert re.search(r"^model.n_embd +20 +24$", compared.stdout, re.MULTILINE), compared.stderr
    assert re.search(r"\n(HEAD|wider) is better than (HEAD|wider) by \d\.\d{4} ± 0\.\d{4} nats \(", compared.stdout)
    assert minigpt("compare", "widr", cwd=copy).stderr.endswith("; did you mean wider?\n")
    assert command("git", "commit", "--quiet", "--all", "--message", "Wider", cwd=copy).returncode == 0
    rows = [line.split("  ")[0] for line in minigpt("compare", cwd=copy).stdout.splitlines()[1:3]]
    earlier = command("git", "rev-parse", "--short", "HEAD~1", cwd=copy).stdout.strip()
    assert sorted(rows) == sorted([f"{branch}, wider*", earlier])
    assert minigpt("compare", first["run"][:8], "wider", cwd=copy).returncode == 0  # the run of the earlier commit
    clone = copy.with_name("clone")  # has the commits and experiments, and no cache
    assert command("git", "clone", "--quiet", copy, clone, cwd=copy).returncode == 0
    assert command("git", "fetch", "--quiet", "origin", "refs/exps/*:refs/exps/*", cwd=clone).returncode == 0
    compared = minigpt("compare", "HEAD", "wider", cwd=clone)
    assert "HEAD: no validation loss; `dvc repro evaluate` or `dvc pull` brings its results" in compared.stderr


def test_dvc_shows_plots_metrics_and_params(copy):
    shown = command("dvc", "metrics", "show", cwd=copy).stdout
    assert "val_loss" in shown
    assert max(map(len, shown.splitlines())) <= 160
    set_params(copy, {"model": {"n_embd": 21}})
    changed = json.loads(command("dvc", "params", "diff", "--json", cwd=copy).stdout)
    assert changed["params.yaml"]["model.n_embd"]["new"] == 21
    plotted = json.loads(command("dvc", "plots", "show", "--json", cwd=copy).stdout)["data"]
    assert set(plotted) == {"loss", "baselines", "calibration", "positions", "characters", "confusions"}
    points = {name: drawn["content"]["data"]["values"] for name, (drawn,) in plotted.items()}
    curves = {point["filename::field"] for point in points["loss"]}
    assert curves == {"batches.csv::batch_loss", "history.csv::train_loss", "history.csv::val_loss"}
    assert len(points["positions"]) == 8  # bins of the 16 positions
    assert points["baselines"][0]["model"] == "this model"


BAD_TEXTS = {
    "missing": (None, "data/mine.txt"),
    "empty": (b"", "data/mine.txt: empty"),
    "binary": (b"abc\0" * 900, "a binary file, not text: NUL at byte 3"),
    "latin1": ("é".encode("latin1") * 900, "not UTF-8 at byte 0"),
    "short": (b"abcdefgh" * 2, "too few for model.block_size = 16"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_text_is_rejected_in_one_line(workspace, kind):
    data, message = BAD_TEXTS[kind]
    set_params(workspace, {"data": {"source": "data/mine.txt"}})
    if data is not None:
        (workspace / "data/mine.txt").write_bytes(data)
    ran = python("-m", "stages.prepare", cwd=workspace)
    assert ran.returncode == 1, ran.stdout
    (line,) = ran.stderr.splitlines()
    assert message in line
    assert not list((workspace / "data").glob("*prepared*"))


def test_outputs_can_be_restored_after_a_bad_text(copy):
    (copy / "data/mine.txt").write_bytes("é".encode("latin1") * 900)
    set_params(copy, {"data": {"source": "data/mine.txt"}})
    ran = command("dvc", "repro", cwd=copy)
    assert ran.returncode != 0
    assert "`dvc checkout --force dvc.yaml` restores the outputs of the last successful run" in ran.stderr
    set_params(copy, {"data": {"source": "data/songs.txt"}})
    assert command("dvc", "checkout", "--force", "dvc.yaml", cwd=copy).returncode == 0
    assert stages_run(repro(copy)) == []


def test_outputs_can_be_restored_after_a_training_that_diverged(copy):
    trained = (copy / "results/train/history.csv").read_bytes()
    set_params(copy, {"train": {"learning_rate": 1e9, "adam_learning_rate": 1e9}})
    ran = command("dvc", "repro", cwd=copy)
    assert "training diverged" in ran.stderr
    fix = re.search("minigpt: `(dvc checkout .*)` restores", ran.stderr)[1]
    assert command(*fix.split(), cwd=copy).returncode == 0
    assert (copy / "results/train/history.csv").read_bytes() == trained


MISTAKES = {
    "train": ({"train": {"device": "cuda"}}, "CUDA devices found: 0"),
    "sample": ({"sample": {"prompts": ["hello"]}}, "sample.prompts[0]: character 1, 'h' (U+0068 LATIN SMALL LETTER H)"),
    "prepare": ({"model": {"n_embd": "abc"}, "train": {"seed": -1}}, "2 mistakes"),
}


@pytest.mark.parametrize("stage", ["train", "prepare", pytest.param("sample", marks=pytest.mark.slow)])
def test_mistake_in_params_keeps_the_outputs(copy, stage):
    written = [path for part in ("models", "results", "data") for path in (copy / part).rglob("*.*")]
    outputs = {path: path.read_bytes() for path in written}
    changes, message = MISTAKES[stage]
    set_params(copy, changes)
    ran = python("-m", f"stages.{stage}", cwd=copy, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {path: path.read_bytes() for path in outputs} == outputs


@pytest.mark.slow
def test_experiment_runs_from_a_profile(copy):
    (copy / "data/shakespeare.txt").write_text("in place of the text that would be fetched")
    assert python("-m", "minigpt", "profile", "shakespeare-quick", "--force", cwd=copy).returncode == 0
    changes = ["data.source=data/songs.txt", "train.max_iters=2", "train.device=cpu", "sample.max_new_tokens=5"]
    arguments = [argument for change in changes for argument in ("-S", change)]
    ran = command("dvc", "exp", "run", "--name", "quick", *arguments, cwd=copy)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    params, profile = load(copy / "params.yaml"), profiles.load_profile("shakespeare-quick", ROOT)
    assert params.model == profile.model
    assert (params.train.max_iters, params.data.source) == (2, "data/songs.txt")
    assert json.loads((copy / "results/train/metrics.json").read_text())["steps"] == 2
