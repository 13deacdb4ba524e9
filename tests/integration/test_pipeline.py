"""The real pipeline in a copy of the project: DVC, its experiments, and an MLflow store."""

import ast
import csv
import json
import re
import shutil

import pytest
import yaml
from helpers.workspace import ROOT, SHAKESPEARE, command, make_repository, python, set_params

CORE = [
    *("errors", "files", "params", "tokenizer", "corpus", "baselines", "memorised", "ranks", "model", "optimizer"),
    *("score", "report", "drafts", "checkpoint", "decoder", "native", "generator", "trainer"),
]
ORDER = [*CORE, "journal", "machine", "tracking", "serving", "dagshub"]
APART = {"__main__", "charts", "launcher", "page", "process"}
CHANGE_NO_RESULT = {"errors", "files", "params", "checkpoint", *ORDER[len(CORE) :], *APART}


def imports(path):
    """The modules of the library that a file imports anywhere, not for its types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "minigpt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minigpt."):
            found.add(node.module.split(".")[1])
    return found


def others(path):
    """The packages that importing a file imports, at its top level."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]}


def test_imports_go_one_way():
    for name in ORDER:
        later = ORDER[ORDER.index(name) :]
        assert not imports(ROOT / f"minigpt/{name}.py") & set(later), name
    assert {path.stem for path in (ROOT / "minigpt").glob("*.py")} == {*ORDER, *APART, "__init__"}


def test_the_core_needs_neither_mlflow_nor_dvc():
    for name in CORE:
        assert not others(ROOT / f"minigpt/{name}.py") & {"mlflow", "dvc"}, name


def test_what_needs_no_torch_does_not_import_it():
    code = (
        "import sys, stages.prepare, stages.train, stages.evaluate, stages.sample, minigpt.tracking;"
        "print(sorted({'torch', 'mlflow', 'dvc'} & set(sys.modules)))"
    )
    assert python("-c", code, cwd=ROOT).stdout.strip() == "[]"


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate", "sample"])
def test_each_stage_depends_on_the_modules_that_decide_its_result(stage):
    reached, found = set(), imports(ROOT / f"stages/{stage}.py")
    while found := found - reached - CHANGE_NO_RESULT:
        reached |= found
        found = set().union(*(imports(ROOT / f"minigpt/{name}.py") for name in found))
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    assert {d for d in deps if d.endswith(".py")} == {f"stages/{stage}.py"} | {f"minigpt/{name}.py" for name in reached}


def test_the_readme_names_every_param_and_every_target():
    text = (ROOT / "README.md").read_text()
    for section, values in yaml.safe_load((ROOT / "params.yaml").read_text()).items():
        for key in values:
            assert f"`{key}`" in text, f"{section}.{key}"
    for target in re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert f"make {target}" in text, target


def test_the_drama_is_original():
    text = (ROOT / "data/drama.txt").read_text()
    assert len(text) >= 120_000
    lines = [line for line in text.split("\n") if line and not re.fullmatch(r"[A-Z ]+:|\[.*|.*\]|ACT .*", line)]
    assert len(lines) == len(set(lines))
    if SHAKESPEARE is None:
        pytest.skip("Tiny Shakespeare is not here to compare with")
    runs = lambda words: {tuple(words[i : i + 8]) for i in range(len(words) - 7)}  # noqa: E731
    words = lambda written: re.findall(r"[a-z']+", written.lower())  # noqa: E731
    assert not runs(words(text)) & runs(words(SHAKESPEARE.read_text()))


def test_the_songs_are_in_devanagari():
    text = (ROOT / "data/songs.txt").read_text()
    assert len(text) >= 15_000
    assert set(re.sub(r"[\u0900-\u097f]", "", text)) <= set(" \n,?!-")


@pytest.fixture(scope="module")
def repository(tmp_path_factory, project_files):
    """A git repository of the project with small params, reproduced once; gives its folder and what was printed."""
    folder = make_repository(tmp_path_factory.mktemp("pipeline") / "repository", project_files)
    return folder, repro(folder)


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


def test_one_command_makes_everything(repository):
    folder, printed = repository
    assert stages_run(printed) == ["prepare", "train", "evaluate", "sample"]
    for name in (
        "data/prepared/train.npy", "models/gpt/model.safetensors", "results/train/metrics.json",
        "results/evaluate/metrics.json", "results/evaluate/positions.csv", "results/evaluate/characters.csv",
        "results/evaluate/confusions.csv", "results/evaluate/calibration.csv", "results/evaluate/baselines.csv",
        "results/sample/samples.txt", "results/sample/memorised.csv", "results/sample/metrics.json",
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
    assert run.metrics["evaluate.val.loss"] == scores["val"]["loss"]
    assert {"train_loss", "val_loss", "learning_rate", "grad_norm", "chars_per_second"} <= set(run.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(run.metrics)
    assert len(run.tags["mlflow.source.git.commit"]) == 40
    assert "threads" in run.tags["device"]
    assert run.tags["throughput"].endswith("characters/s")
    assert found[0].inputs.dataset_inputs[0].dataset.name == "songs.txt"
    files = {file.path for file in client.list_artifacts(found[0].info.run_id)}
    assert {"model", "sample", "evaluate", "train", "params.yaml", "dvc.lock"} <= files
    drawn = {file.path for file in client.list_artifacts(found[0].info.run_id, "train")}
    assert drawn == {"train/history.csv", "train/loss.png"}
    shown = {file.path for file in client.list_artifacts(found[0].info.run_id, "evaluate")}
    assert {f"evaluate/{name}" for name in ("evaluation.png", "characters.csv", "metrics.json")} <= shown
    assert run.metrics["evaluate.baselines.6-gram"] == scores["baselines"]["6-gram"]
    assert {"evaluate.val.calibration_error", "sample.memorised.longest_run"} <= set(run.metrics)

    summed = python("-m", "stages", cwd=folder)
    assert f"{scores['val']['loss']:.4f} nats" in summed.stdout
    assert f"{scores['baselines']['5-gram']:.4f} nats, a 5-gram" in summed.stdout
    assert "runs      mlflow.db\n" in summed.stdout
    summed = python("-m", "stages", cwd=folder, MLFLOW_TRACKING_URI="http://me:secret@mlflow.example.com")
    assert "runs      http://mlflow.example.com\n" in summed.stdout
    assert "secret" not in summed.stdout


def test_the_evaluation_says_what_its_figures_are_worth(repository):
    folder, printed = repository
    scores = json.loads((folder / "results/evaluate/metrics.json").read_text())
    val, train, baselines = scores["val"], scores["train"], scores["baselines"]
    assert re.search(r"the validation split is short: 1,912 characters .* \+-0\.\d+ nats", printed)
    assert 0.001 < val["standard_error"] < 0.2
    assert 0 < val["calibration_error"] < 1
    assert (train["characters"], train["sampling_error"]) == (train["split_characters"], 0)
    assert baselines["characters"] == train["characters"] + 1
    assert baselines["uniform"] > baselines["unigram"] > baselines["2-gram"] > baselines["3-gram"] > 1.5
    with (folder / "results/evaluate/characters.csv").open(encoding="utf-8", newline="") as file:
        assert sum(int(row["count"]) for row in csv.DictReader(file)) == val["characters"]
    with (folder / "results/sample/memorised.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    text = (folder / "data/songs.txt").read_text(encoding="utf-8")
    written = (folder / "results/sample/samples.txt").read_text(encoding="utf-8")
    assert row["run"] in text
    assert row["run"] in written
    assert len(row["run"]) == int(row["longest_run"])


def test_again_nothing_runs(repository):
    assert stages_run(repro(repository[0])) == []


def change(folder, path, old, new):
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "path, old, new, reruns",
    [
        ("params.yaml", "temperature: 0.8", "temperature: 0.7", ["sample"]),
        ("minigpt/generator.py", "\nfrom __future__", "\n# a comment\nfrom __future__", ["sample"]),
        ("params.yaml", "stride: 0", "stride: 3", ["evaluate"]),
        ("params.yaml", "n_layer: 2", "n_layer: 1", ["train", "evaluate", "sample"]),
    ],
)
def test_a_change_reruns_what_it_concerns(repository, path, old, new, reruns):
    folder, _ = repository
    change(folder, path, old, new)
    assert stages_run(repro(folder)) == reruns


def test_a_sample_of_a_long_training_split_says_so(repository):
    folder, _ = repository
    change(folder, "params.yaml", "train_chars: 2000000", "train_chars: 1000")
    assert stages_run(repro(folder)) == ["evaluate"]
    train = json.loads((folder / "results/evaluate/metrics.json").read_text())["train"]
    assert 900 < train["characters"] <= 1024 < train["split_characters"]
    assert 0 < train["sampling_error"] < 0.2


def test_experiments_are_listed_beside_each_other(repository):
    folder, _ = repository
    before = len(runs(folder)[1])
    ran = command("dvc", "exp", "run", "--name", "wider", "-S", "model.n_embd=512", cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shown = command("dvc", "exp", "show", "--csv", "--no-pager", cwd=folder).stdout
    rows = {row["Experiment"]: row for row in csv.DictReader(shown.splitlines())}
    assert rows["wider"]["model.n_embd"] == "512"
    assert float(rows["wider"]["val.loss"]) > 0
    _, found = runs(folder)
    assert len(found) == before + 1
    assert found[0].info.run_name == "wider"
    assert found[0].data.params["model.n_embd"] == "512"
    assert found[0].data.tags["dvc.experiment"] == "wider"


def test_plots_metrics_and_params_are_dvcs_to_show(repository):
    folder, _ = repository
    assert "val.loss" in command("dvc", "metrics", "show", cwd=folder).stdout
    set_params(folder, {"model": {"n_embd": 21}})
    changed = json.loads(command("dvc", "params", "diff", "--json", cwd=folder).stdout)
    assert changed["params.yaml"]["model.n_embd"]["new"] == 21
    set_params(folder, {"model": {"n_embd": 20}})
    plotted = json.loads(command("dvc", "plots", "show", "--json", cwd=folder).stdout)["data"]
    assert set(plotted) == {"loss", "baselines", "calibration", "positions", "characters", "confusions"}
    points = {name: drawn["content"]["data"]["values"] for name, (drawn,) in plotted.items()}
    assert {"train_loss", "val_loss"} == {point["field"] for point in points["loss"]}
    assert len(points["positions"]) == 16
    assert points["baselines"][0]["model"] == "this model"


BAD_TEXTS = {
    "missing": (None, "data/mine.txt"),
    "empty": (b"", "data/mine.txt: empty"),
    "binary": (b"abc\0" * 900, "a binary file, not text: NUL at byte 3"),
    "latin1": ("é".encode("latin1") * 900, "not UTF-8 at byte 0"),
    "short": (b"abcdefgh" * 2, "too few for model.block_size = 16"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_corpus_ends_before_any_work(repository, kind):
    folder, _ = repository
    data, message = BAD_TEXTS[kind]
    set_params(folder, {"data": {"source": "data/mine.txt"}})
    (folder / "data/mine.txt").unlink(missing_ok=True)
    if data is not None:
        (folder / "data/mine.txt").write_bytes(data)
    ran = command("dvc", "repro", cwd=folder)
    printed = ran.stdout + ran.stderr
    assert ran.returncode != 0
    assert message in printed
    assert "Traceback" not in printed
    assert not list((folder / "data").glob(".prepared*"))
    (folder / "data/mine.txt").unlink(missing_ok=True)
    set_params(folder, {"data": {"source": "data/songs.txt"}})
    assert command("dvc", "checkout", "dvc.yaml", cwd=folder).returncode == 0
    assert (folder / "models/gpt/model.safetensors").exists()


MISTAKES = {
    "train": ({"train": {"device": "cuda"}}, "CUDA devices are here"),
    "sample": ({"sample": {"prompts": ["hello"]}}, "sample.prompts[0]: character 1, 'h' (U+0068 LATIN SMALL LETTER H)"),
    "prepare": ({"model": {"n_embd": "abc"}, "train": {"seed": -1}}, "2 mistakes"),
}


@pytest.mark.parametrize("stage", MISTAKES)
def test_a_mistake_in_params_leaves_earlier_outputs_alone(repository, stage, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(repository[0], folder, ignore=shutil.ignore_patterns(".git", "cache"))
    written = [path for part in ("models", "results", "data") for path in (folder / part).rglob("*.*")]
    outputs = {path: path.read_bytes() for path in written}
    changes, message = MISTAKES[stage]
    set_params(folder, changes)
    ran = python("-m", f"stages.{stage}", cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {path: path.read_bytes() for path in outputs} == outputs
