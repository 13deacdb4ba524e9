import shutil
import subprocess

import pytest
import yaml
from helpers.workspace import ROOT, make_repository, python, set_params

from minigpt import profiles
from minigpt.errors import UserError
from minigpt.params import flatten, load

NAMES = profiles.names(ROOT)
SHIPPED = (ROOT / "params.yaml").read_text()


def differences(name):
    return flatten(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()))


def test_default_is_listed_first_and_is_the_shipped_file():
    assert NAMES[0] == "default"
    assert profiles.apply("default", SHIPPED, ROOT) == SHIPPED


@pytest.mark.parametrize("name", NAMES)
def test_profile_has_only_differences_each_with_its_reason(name):
    shipped = flatten(load(ROOT / "params.yaml"))
    assert set(differences(name)) <= set(differences("default"))
    assert name == "default" or all(shipped[key] != value for key, value in differences(name).items())
    lines = (ROOT / f"configs/{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    values = [line for line in lines if line.startswith("  ")]
    assert len(values) == len(differences(name))
    assert all("  # " in line for line in values)


@pytest.mark.parametrize("name", NAMES)
def test_default_sets_only_keys_of_other_profiles(name):
    others = set().union(*(differences(other) for other in NAMES if other != "default"))
    assert set(differences("default")) == others


def comments(text):
    return [line.partition("#")[2] for line in text.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_profile_keeps_comments_and_layout(name):
    written = profiles.apply(name, SHIPPED, ROOT)
    assert comments(written) == comments(SHIPPED)
    assert [line.find("#") for line in written.splitlines()] == [line.find("#") for line in SHIPPED.splitlines()]
    assert profiles.apply("default", written, ROOT) == SHIPPED


def test_profile_gets_another_text(minigpt, tmp_path):
    for name in ("params.yaml", "configs/default.yaml", "configs/short-text.yaml", "data/drama.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    missing = minigpt("profile", "short-text", "--source", "data/mine.txt", cwd=tmp_path)
    assert missing.stderr.startswith("minigpt: data/mine.txt: no such file or folder")
    (tmp_path / "data/mine.txt").write_text("To be, or not to be")
    written = minigpt("profile", "short-text", "--source", "data/mine.txt", cwd=tmp_path)
    assert (
        written.stdout == "minigpt: params.yaml has the values of short-text, with data/mine.txt; `dvc repro` runs it\n"
    )
    assert load(tmp_path / "params.yaml").data.source == "data/mine.txt"
    assert comments((tmp_path / "params.yaml").read_text()) == comments(SHIPPED)


def test_profiles_can_follow_one_another():
    written = profiles.apply("reference", profiles.apply("shakespeare-cpu", SHIPPED, ROOT), ROOT)
    assert written == profiles.apply("reference", SHIPPED, ROOT)


def test_profile_keeps_other_keys_of_the_user():
    mine = SHIPPED.replace("num_samples: 1 ", "num_samples: 7 ")
    written = yaml.safe_load(profiles.apply("shakespeare-cpu", mine, ROOT))
    assert (written["sample"]["num_samples"], written["model"]["n_embd"]) == (7, 192)


def test_profile_with_an_unknown_key_or_a_wrong_type_is_rejected(workspace):
    (workspace / "configs/mine.yaml").write_text("# Mine.\nmodel:\n  n_layers: 2\ntrain:\n  max_iters: many\n")
    with pytest.raises(UserError, match=r"configs/mine\.yaml: 2 mistakes\n.*did you mean n_layer\?\n.*got 'many'"):
        profiles.load_profile("mine", workspace)


@pytest.mark.parametrize("text", ["model: 3\n", "models: {n_layer: 2}\n", "- 1\n", "a: 1\na: 2\n", "model: [\n"])
def test_profile_of_another_form_is_one_message(workspace, text):
    (workspace / "configs/mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"configs/mine\.yaml: [^\n]*$"):
        profiles.load_profile("mine", workspace)


@pytest.mark.parametrize("git", [True, False])
def test_profile_may_replace_another_that_is_not_committed(tmp_path, project_files, workspace, git, monkeypatch):
    folder = make_repository(tmp_path / "repository", project_files) if git else workspace
    (folder / "params.yaml").write_text(SHIPPED)
    (folder / "data/shakespeare.txt").write_text("in place of the text that would be fetched")
    monkeypatch.chdir(folder)
    profiles.write("shakespeare-cpu")
    assert profiles.is_applied("shakespeare-cpu")
    profiles.write("reference")
    assert profiles.is_applied("reference")
    profiles.write("default")
    assert (folder / "params.yaml").read_text() == SHIPPED


def test_untracked_params_count_as_not_committed(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    subprocess.run(["git", "init", "--quiet"], check=True)
    with pytest.raises(UserError, match="not committed"):
        profiles.write("reference")


def test_profile_needs_valid_params(workspace):
    set_params(workspace, {"model": {"n_embd": "abc"}})
    ran = python("-m", "minigpt", "profile", "reference", cwd=workspace)
    assert ran.stderr == "minigpt: params.yaml: model.n_embd: expected an integer, got 'abc'\n"
