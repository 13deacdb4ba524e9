"""Tests of checkpoint folders with contents that no training wrote: each start skips or replaces them."""

import dataclasses
import hashlib
import json
import os
import re

import pytest
import torch
from helpers.trainings import prepare, start_training

from minigpt.training.checkpoint import Checkpoint, Checkpoints, TrainState

LIKE = {"a": torch.zeros(3, 2)}
STATE = TrainState(step=7, history=[{"step": 0, "train_loss": 0.2, "val_loss": 0.1}])
CONTENTS = [
    b"",
    b"{",
    b"17",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"run": 3}',
    b'{"run": "../../x"}',
]
"""Damaged JSON files, and JSON of another structure."""
WRONG_STATES = [
    {"step": "7"}, {"step": 7.5}, {"step": 8}, {"best_loss": None}, {"history": {}}, {"history": []}, {"history": [1]},
    {"history": [{"step": 0}]}, {"best_step": 5}, {"resumed_at": "1"}, {"extra": 1},
]  # fmt: skip
"""Changes of a checkpoint's state after which it describes no training."""


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, "f00d")


def replace_file(folder, name, data):
    """Replace a file of a checkpoint, and its digest."""
    (folder / name).write_bytes(data)
    digests = json.loads((folder / "digests.json").read_text())
    (folder / "digests.json").write_text(json.dumps(digests | {name: hashlib.sha256(data).hexdigest()}))


def make_folder(path):
    path.mkdir()


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:20]))
def test_damaged_run_record_is_replaced(checkpoints, capsys, content):
    checkpoints.folder.mkdir(parents=True)
    (checkpoints.folder / "run.json").write_bytes(content)
    key = checkpoints.run_key()
    assert re.fullmatch("[0-9a-f]{32}", key)
    assert "run.json: damaged: " in capsys.readouterr().err
    assert checkpoints.run_key() == key
    assert [path.name for path in checkpoints.folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("make", [make_folder, make_pipe])
def test_folder_or_pipe_in_place_of_a_file_is_replaced_or_skipped(checkpoints, make):
    checkpoints.folder.mkdir(parents=True)
    for path in (checkpoints.folder / "run.json", checkpoints.folder.with_suffix(".pid")):
        make(path) if make is make_folder or path.name == "run.json" else path.touch()
    make_folder(checkpoints.folder.with_suffix(".lock"))
    with checkpoints.locked():
        assert checkpoints.run_key() == checkpoints.run_key()
    checkpoints.save(Checkpoint({"a": torch.ones(3, 2)}, STATE))
    for name in ("state.json", "digests.json", "state.safetensors"):
        (checkpoints.folder / "step-000007" / name).unlink()
        make(checkpoints.folder / "step-000007" / name)
        found, damaged = checkpoints.load(LIKE)
        assert found is None
        assert "step-000007: damaged, skipped: " in damaged[0]


def test_file_in_place_of_a_folder_is_replaced_or_skipped(checkpoints):
    checkpoints.folder.parent.mkdir()
    checkpoints.folder.write_text("a file")
    checkpoints.run_key()
    for name in ("step-000001", "step-000002", "step-000009", ".step-000007-new.tmp", ".step-000007-old.tmp"):
        (checkpoints.folder / name).write_text("a file")
    checkpoints.save(Checkpoint({"a": torch.ones(3, 2)}, STATE))
    found, damaged = checkpoints.load(LIKE)
    assert found.state == STATE
    assert len(damaged) == 1
    assert "step-000009: damaged, skipped" in damaged[0]
    assert {path.name for path in checkpoints.folder.iterdir()} == {"run.json", "step-000007", "step-000009"}


@pytest.mark.parametrize("change", WRONG_STATES, ids=str)
def test_state_that_describes_no_training_is_skipped(checkpoints, change):
    checkpoints.save(Checkpoint({"a": torch.ones(3, 2)}, STATE))
    folder = checkpoints.folder / "step-000007"
    replace_file(folder, "state.json", json.dumps(dataclasses.asdict(STATE) | change).encode())
    found, (damaged,) = checkpoints.load(LIKE)
    assert found is None
    assert "damaged, skipped: state.json: " in damaged


def test_state_without_one_of_its_facts_is_skipped(checkpoints):
    checkpoints.save(Checkpoint({"a": torch.ones(3, 2)}, STATE))
    for name in dataclasses.asdict(STATE):
        state = {key: value for key, value in dataclasses.asdict(STATE).items() if key != name}
        replace_file(checkpoints.folder / "step-000007", "state.json", json.dumps(state).encode())
        found, (damaged,) = checkpoints.load(LIKE)
        assert found is None
        assert f"state.json: {name} is missing" in damaged


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize("name", ["state.json", "digests.json", "state.safetensors"])
def test_file_of_other_structure_is_skipped(checkpoints, name, content):
    checkpoints.save(Checkpoint({"a": torch.ones(3, 2)}, STATE))
    folder = checkpoints.folder / "step-000007"
    if name == "digests.json":
        (folder / name).write_bytes(content)
    else:
        replace_file(folder, name, content)
    found, (damaged,) = checkpoints.load(LIKE)
    assert found is None
    assert "damaged, skipped" in damaged


@pytest.mark.slow
def test_stage_trains_with_a_damaged_checkpoint_folder(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files)
    stopped = start_training(folder)
    while not (paths := list((folder / ".checkpoints").glob("*/run.json"))):
        assert stopped.poll() is None, stopped.communicate()[0]
    stopped.kill()
    stopped.communicate()
    (run_record,) = paths
    run_record.write_text("")
    (run_record.parent / "step-000050").write_text("a file")
    process = start_training(folder)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert f"{run_record}: damaged: " in printed
    assert "step-000050: damaged, skipped" in printed
    assert "starting from step 0: no checkpoint of this training is intact" in printed
    assert "Traceback" not in printed
    (folder / ".checkpoints" / run_record.parent.name).with_suffix(".lock").unlink(missing_ok=True)
    (folder / ".checkpoints").rmdir()
    (folder / ".checkpoints").write_text("a file")
    blocked = start_training(folder)
    printed, _ = blocked.communicate(timeout=120)
    assert blocked.returncode == 1
    assert f"minigpt: cannot write {folder}/.checkpoints: File exists\n" in printed
    assert "Traceback" not in printed
