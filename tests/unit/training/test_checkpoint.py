import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.workspace import FULL, ROOT, params_with

from minigpt.errors import UserError
from minigpt.training.checkpoint import Checkpoint, Checkpoints, TrainState, fingerprint

LIKE = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.int64)}

HISTORY_ROW = {"step": 0, "train_loss": 0.2, "val_loss": 0.1}


def checkpoint_at(step):
    tensors = {"a": torch.full((3, 2), float(step)), "b": torch.arange(4)}
    return Checkpoint(tensors, TrainState(step=step, resumed_at=[1], history=[HISTORY_ROW]))


def saved_folders(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, "f00d")


def test_newest_checkpoint_is_loaded_and_two_are_kept(checkpoints):
    assert checkpoints.load(LIKE) == (None, [])
    for step in (3, 7, 20):
        checkpoints.save(checkpoint_at(step))
    found, damaged = checkpoints.load(LIKE)
    assert damaged == []
    assert found.state == checkpoint_at(20).state
    assert torch.equal(found.tensors["a"], checkpoint_at(20).tensors["a"])
    assert saved_folders(checkpoints) == ["step-000007", "step-000020"]
    checkpoints.remove()
    assert not checkpoints.folder.exists()


def test_newest_checkpoint_is_the_one_with_the_highest_step(checkpoints):
    for step in (999_998, 999_999, 1_000_000):
        checkpoints.save(checkpoint_at(step))
    assert checkpoints.load(LIKE)[0].state.step == 1_000_000
    assert saved_folders(checkpoints) == ["step-1000000", "step-999999"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_skipped_and_named(checkpoints, name, damage):
    checkpoints.save(checkpoint_at(3))
    checkpoints.save(checkpoint_at(7))
    path = checkpoints.folder / "step-000007" / name
    data = path.read_bytes()
    positions = [0] if damage == "remove" else range(len(data.rstrip()))
    positions = positions if FULL else positions[:: max(1, len(positions) // 20)]
    for position in positions:
        if damage == "remove":
            path.unlink()
        elif damage == "flip":
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        else:
            path.write_bytes(data[:position])
        found, damaged = checkpoints.load(LIKE)
        assert found.state.step == 3
        assert len(damaged) == 1
        assert "step-000007: damaged, skipped" in damaged[0]
    print(f"{name}: {len(positions)} of {len(positions)} skipped ({damage})")


def test_lock_names_its_holder_and_is_freed_when_the_holder_is_killed(checkpoints, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from minigpt.training.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]), 'f00d').locked(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} is already running"), checkpoints.locked():
            pass
        holder.kill()
    with checkpoints.locked():
        assert checkpoints.folder.with_suffix(".pid").read_text() == f"{os.getpid()}\n"


def test_worker_of_a_queue_waits_for_the_same_training(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minigpt.training.checkpoint.queue_worker", lambda: (0, 2))
    code = (
        "import sys; from pathlib import Path; from minigpt.training.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]), 'f00d')\n"
        "with checkpoints.locked(): print('locked', flush=True); sys.stdin.read(); checkpoints.remove()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        threading.Timer(1, holder.stdin.close).start()
        with checkpoints.locked():
            assert holder.stdin.closed
            assert checkpoints.folder.with_suffix(".pid").read_text() == f"{os.getpid()}\n"
    assert f"waiting for process {holder.pid}, which runs the same training" in capsys.readouterr().out


def test_lock_is_released_after_an_error_and_after_remove(checkpoints):
    with pytest.raises(ZeroDivisionError), checkpoints.locked():
        raise ZeroDivisionError
    with checkpoints.locked():
        checkpoints.remove()
    with checkpoints.locked():
        assert checkpoints.folder.with_suffix(".lock").exists()


def test_run_key_stays_until_the_training_completes(checkpoints):
    key = checkpoints.run_key()
    assert len(key) == 32
    assert checkpoints.run_key() == key
    checkpoints.remove()
    assert checkpoints.run_key() != key


def test_fingerprint_depends_on_model_train_and_data_alone():
    base = fingerprint(params_with(), "digest")
    assert fingerprint(params_with(sample={"temperature": 0.1}, evaluate={"stride": 3}), "digest") == base
    assert fingerprint(params_with(train={"processes": 2, "grad_accum": 2, "parallel": "fsdp"}), "digest") == (
        fingerprint(params_with(train={"grad_accum": 2}), "digest")
    )
    others = {
        fingerprint(params_with(model={"n_layer": 3}), "digest"),
        fingerprint(params_with(train={"seed": 3}), "digest"),
        fingerprint(params_with(), "other"),
    }
    assert len(others | {base}) == 4


def test_checkpoint_of_another_shape_is_skipped(checkpoints):
    checkpoints.save(checkpoint_at(3))
    for other in ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2, dtype=torch.float16)}):
        checkpoints.save(Checkpoint({**other, "b": torch.arange(4)}, checkpoint_at(7).state))
        found, damaged = checkpoints.load(LIKE)
        assert found.state.step == 3
        assert "a has another shape or number format" in damaged[0]


def test_remains_of_a_killed_save_are_removed(checkpoints):
    checkpoints.save(checkpoint_at(3))
    (checkpoints.folder / ".step-000007-x1y2.tmp").mkdir()
    checkpoints.save(checkpoint_at(7))
    assert saved_folders(checkpoints) == ["step-000003", "step-000007"]


def test_other_unfinished_trainings_are_counted(checkpoints, tmp_path):
    checkpoints.save(checkpoint_at(3))
    assert checkpoints.count_others() == 0
    assert Checkpoints(tmp_path, "beef").count_others() == 1
