import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.workspace import ROOT, params_with

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.export import export, load_model
from minigpt.model import GPT
from minigpt.training.checkpoint import Checkpoints, State, fingerprint

LIKE = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.int64)}


def state(step):
    return State({"a": torch.full((3, 2), float(step)), "b": torch.arange(4)}, {"step": step, "history": [{"x": 0.1}]})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, "f00d")


def test_the_newest_state_comes_back_and_two_are_kept(checkpoints):
    assert checkpoints.load(LIKE) == (None, [])
    for step in (3, 7, 20):
        checkpoints.save(state(step))
    found, damaged = checkpoints.load(LIKE)
    assert damaged == []
    assert found.facts == state(20).facts
    assert torch.equal(found.tensors["a"], state(20).tensors["a"])
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000007", "step-000020"]
    checkpoints.remove()
    assert not checkpoints.folder.exists()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_state_is_passed_over_and_named(checkpoints, name, harm):
    checkpoints.save(state(3))
    checkpoints.save(state(7))
    path = checkpoints.folder / "step-000007" / name
    data = path.read_bytes()
    places = [0] if harm == "remove" else range(len(data.rstrip()))
    places = places if os.environ.get("TORTURE") == "full" else places[:: max(1, len(places) // 20)]
    for place in places:
        if harm == "remove":
            path.unlink()
        elif harm == "flip":
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        else:
            path.write_bytes(data[:place])
        found, damaged = checkpoints.load(LIKE)
        assert found.facts["step"] == 3
        assert len(damaged) == 1
        assert "step-000007" in damaged[0]
    print(f"{name}: {len(places)} of {len(places)} passed over ({harm})")


def test_a_training_is_locked_against_a_second_one_and_freed_by_death(checkpoints, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from minigpt.training.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]), 'f00d').locked(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} is training"), checkpoints.locked():
            pass
        holder.kill()
    with checkpoints.locked():
        assert checkpoints.folder.with_suffix(".lock").read_text() == f"{os.getpid()}\n"


def test_the_run_key_stays_until_the_training_completes(checkpoints):
    key = checkpoints.run_key()
    assert len(key) == 32
    assert checkpoints.run_key() == key
    checkpoints.remove()
    assert checkpoints.run_key() != key


def test_the_fingerprint_is_of_model_training_and_data_alone():
    base = fingerprint(params_with(), "digest")
    assert fingerprint(params_with(sample={"temperature": 0.1}, evaluate={"stride": 3}), "digest") == base
    others = {
        fingerprint(params_with(model={"n_layer": 3}), "digest"),
        fingerprint(params_with(train={"seed": 3}), "digest"),
        fingerprint(params_with(), "other"),
    }
    assert len(others | {base}) == 4


@pytest.fixture(params=[False, True])
def exported(request, tmp_path):
    """A model, and the folder it was exported to."""
    torch.manual_seed(0)
    model = GPT(params_with(model={"tied_head": request.param, "init": "normal"}).model, 3).eval()
    export(tmp_path / "gpt", model.config, model.state_dict(), Tokenizer("abc"))
    return model, tmp_path / "gpt"


def test_an_exported_model_is_one_folder_that_gives_the_same_logits(exported):
    model, folder = exported
    loaded, tokenizer = load_model(folder)
    ids = torch.randint(3, (2, 16))
    assert torch.equal(loaded(ids), model(ids))
    assert tokenizer.characters == "abc"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "remove"])
def test_a_damaged_model_is_refused_by_the_name_of_its_file(exported, name, harm):
    _, folder = exported
    data = (folder / name).read_bytes()
    if harm == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    with pytest.raises(UserError, match=name):
        load_model(folder)


def test_a_model_of_another_shape_is_refused_by_the_name_of_its_weight(exported):
    _, folder = exported
    described = json.loads((folder / "config.json").read_text())
    described["model"]["n_embd"] += 1
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"weight is \(.*config.json asks for"):
        load_model(folder)


def test_a_missing_model_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="dvc repro train"):
        load_model(tmp_path / "gpt")


def test_a_state_of_another_shape_is_passed_over(checkpoints):
    checkpoints.save(state(3))
    checkpoints.save(State({"a": torch.zeros(2, 3), "b": torch.arange(4)}, {"step": 7}))
    found, damaged = checkpoints.load(LIKE)
    assert found.facts["step"] == 3
    assert "a has another shape" in damaged[0]


def test_what_a_killed_save_left_is_cleared_away(checkpoints):
    checkpoints.save(state(3))
    (checkpoints.folder / ".step-000007-x1y2.tmp").mkdir()
    checkpoints.save(state(7))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-000003", "step-000007"]
