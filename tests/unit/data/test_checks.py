"""Tests of the checks before a training, through the stages and the command."""

import os
import re
import shutil

import pytest
import yaml
from helpers.workspace import ROOT, make_workspace, params_with, python, set_params

from minigpt.data.checks import OUTPUTS, check_context, check_corpus, check_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError


def test_context_longer_than_the_training_split_is_rejected():
    check_context(16, 15)
    with pytest.raises(UserError, match=r"16 characters, too few for model\.block_size = 16"):
        check_context(16, 16)


TEXTS = {
    "one character": ("a" * 5000, r"has no character other than 'a' \(U\+0061 LATIN SMALL LETTER A\)"),
    "only newlines": ("\r\n" * 5000, r"has no character other than '\\n' \(U\+000A\)"),
    "no newline": ("abc " * 900, r"sample\.prompts\[0\]: character 1, '\\n' \(U\+000A\), does not occur"),
    "short": ("abc\n" * 4, r"too few for model\.block_size = 16"),
    "too short to split": ("a\n", "too few to split"),
    "empty": ("", "empty"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_a_later_stage_cannot_use_is_rejected(tmp_path, kind):
    text, message = TEXTS[kind]
    (tmp_path / "a.txt").write_text(text, newline="")
    with pytest.raises(UserError, match=message):
        check_text(params_with(data={"source": str(tmp_path / "a.txt")}))


def test_outputs_are_those_of_the_pipeline():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {output for stage in stages.values() for output in stage["outs"]} == set(map(str, OUTPUTS))


@pytest.mark.parametrize(
    "section, path, message",
    [
        ({"data": {"source": "data"}}, "data.source: data", "name a file or folder in it"),
        ({"data": {"source": "."}}, "data.source: .", "name a file or folder in it"),
        ({"data": {"source": "results/sample/samples.txt"}}, "data.source: results/sample/samples.txt", "name a copy"),
        ({"train": {"init_from": "models/gpt"}}, "train.init_from: models/gpt", "name a copy"),
    ],
)
def test_output_of_a_stage_cannot_be_its_input(tmp_path, monkeypatch, section, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}: DVC deletes .* before a stage writes it; {message}$"):
        check_text(params_with(**section))
    check_text(params_with(data={"source": "data/mine"}, train={"init_from": "models/base"}))


def test_check_says_why_it_did_not_read_the_text(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    settings = params_with(data={"source": str(text)})
    assert check_text(settings) == f"{text} does not exist"
    text.write_text("abc\n" * 50)
    assert check_text(settings) == ""
    monkeypatch.setattr("minigpt.data.checks.MIN_PARALLEL_BYTES", 200)
    assert "a.txt was not read, because it has more than" in check_text(settings)


def test_every_prompt_is_checked_after_normalization():
    settings = params_with(sample={"prompts": ["a", "e\u0301", "\u20ac"]})
    with pytest.raises(UserError, match=r"prompts\[2\]: character 1, '\u20ac'"):
        check_corpus(settings, Tokenizer("a\u00e9", "NFC"), 100)
    check_corpus(settings, Tokenizer("a\u00e9\u20ac", "NFC"), 100)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, project_files):
    folder = make_workspace(tmp_path_factory.mktemp("checks") / "work", project_files)
    ran = python("-m", "stages.prepare", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_wrong_prompt_is_reported_before_the_training(minigpt, prepared, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    before = {path: path.read_bytes() for path in (folder / "data/prepared").iterdir()}
    set_params(folder, {"sample": {"prompts": ["ROMEO:"]}})
    found = "character 1, 'R' (U+0052 LATIN CAPITAL LETTER R), does not occur in the training text"
    for ran in (python("-m", "stages.train", cwd=folder), minigpt("check", cwd=folder)):
        assert ran.stderr == f"minigpt: params.yaml: sample.prompts[0]: {found}; use a prompt of characters that do\n"
        assert ran.returncode == 1
    assert {path: path.read_bytes() for path in (folder / "data/prepared").iterdir()} == before
    assert not (folder / "models/gpt").exists()
    assert not (folder / "mlflow.db").exists()


def test_text_of_one_character_is_rejected_by_the_stage(prepared, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    (folder / "data/mine.txt").write_text("\n" * 9000)
    set_params(folder, {"data": {"source": "data/mine.txt"}})
    ran = python("-m", "stages.prepare", cwd=folder)
    found = "has no character other than '\\n' (U+000A)"
    assert ran.stderr == f"minigpt: data/mine.txt: {found}; there is nothing to learn\n"
    assert ran.returncode == 1


def test_named_pipe_in_the_folder_of_texts_does_not_hang(prepared, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    (folder / "data/mine").mkdir()
    os.mkfifo(folder / "data/mine/a.txt")
    set_params(folder, {"data": {"source": "data/mine"}})
    for arguments in (["stages.prepare"], ["minigpt", "check"]):
        ran = python("-m", *arguments, cwd=folder)
        message = "data/mine/a.txt: a named pipe, not a file; remove it (data.source in params.yaml)"
        assert (ran.returncode, ran.stderr) == (1, f"minigpt: {message}\n")


def test_missing_compiler_is_reported_before_the_training(prepared, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    set_params(folder, {"sample": {"compile": "always"}})
    ran = python("-m", "stages.train", cwd=folder, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "params.yaml: sample.compile: no compiled decoder: there is no C++ compiler no-such-compiler" in ran.stderr
    assert ran.returncode == 1
    assert not (folder / "mlflow.db").exists()
