"""A run that cannot be lost: real processes, killed and starved.

The short form runs with all tests; ``make torture`` sets TORTURE=full for every figure. Each test prints its count.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.trainings import LONG, outcome, prepared, start, start_training, states, wait_for
from helpers.workspace import ROOT, SMALL, command, make_repository, overlay, python, set_params
from mlflow import MlflowClient

FULL = os.environ.get("TORTURE") == "full"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, project_files):
    """What a training that nobody disturbs comes to."""
    folder = prepared(tmp_path_factory.mktemp("undisturbed") / "work", project_files)
    ran = start_training(folder)
    printed, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0, printed
    return outcome(folder)


def test_killed_at_random_times_it_comes_to_the_same(tmp_path, project_files, undisturbed):
    trials, kills, in_save, through_dvc = (20 if FULL else 2), 0, 0, 0
    chance = random.Random(0)
    for trial in range(trials):
        if trial % 6:
            folder, program = prepared(tmp_path / str(trial), project_files), (sys.executable, "-m", "stages.train")
        else:
            folder, program = make_repository(tmp_path / str(trial), project_files, LONG), ("dvc", "repro", "train")
            through_dvc += 1
        for _ in range(3):
            process = start(*program, cwd=folder)
            if chance.random() < 0.5:  # inside a save: as soon as its temporary folder is there
                in_save += wait_for(lambda: any((folder / ".checkpoints").glob("*/.step-*.tmp")), process)  # noqa: B023
            else:
                wait_for(lambda: states(folder), process)  # noqa: B023
                time.sleep(chance.random() * 1.5)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.communicate()
        last = start(*program, cwd=folder)
        printed, _ = last.communicate(timeout=300)
        assert outcome(folder) == undisturbed, printed
    print(f"{trials} of {trials} equal the undisturbed run, {through_dvc} through dvc repro, after {kills} kills,")
    print(f"{in_save} of them aimed inside a save")
    assert kills >= trials


@pytest.fixture
def repository(tmp_path, project_files):
    return make_repository(tmp_path / "repository", project_files, LONG)


def trainer(repository):
    """The process that trains here."""
    return int(next((repository / ".checkpoints").glob("*.lock")).read_text())


def group_gone(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


ENDS = ["SIGINT to all", "SIGKILL to dvc alone", *(["SIGKILL to all", "SIGTERM to the stage"] if FULL else [])]


@pytest.mark.parametrize("how", ENDS)
def test_dvc_repro_goes_on_after_any_end(repository, undisturbed, how):
    process = start("dvc", "repro", "train", cwd=repository)
    assert wait_for(lambda: states(repository), process), process.communicate()[0]
    stage = trainer(repository)
    if how == "SIGKILL to dvc alone":
        os.kill(process.pid, signal.SIGKILL)
    elif how == "SIGTERM to the stage":
        os.kill(stage, signal.SIGTERM)
    else:
        os.killpg(process.pid, getattr(signal, how.split()[0]))
    printed, _ = process.communicate(timeout=60)
    for _ in range(600):  # an orphan notices within a second
        if group_gone(process.pid):
            break
        time.sleep(0.05)
    assert group_gone(process.pid)
    assert process.returncode != 0
    assert not (repository / "models/gpt").exists()
    assert "train:" not in ((repository / "dvc.lock").read_text() if (repository / "dvc.lock").exists() else "")
    if how == "SIGTERM to the stage":
        saved = re.search(r"stopped by SIGTERM; saved after step (\d+)", printed)
        assert f"step-{int(saved[1]):06d}" == states(repository)[-1].parent.name
        assert "exited with 143" in printed
    again = start("dvc", "repro", "train", cwd=repository)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert "goes on after step" in printed
    assert outcome(repository) == undisturbed


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_within_a_step_and_sets_the_exit_code(tmp_path, project_files, name, code):
    folder = prepared(tmp_path / "work", project_files, {"train": {"max_iters": 100_000}})
    process = start_training(folder, MINIGPT_CHECKPOINT_SECONDS="1000", MINIGPT_CHECKPOINT_STEPS="50")
    assert wait_for(lambda: states(folder), process)
    os.kill(process.pid, getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(rf"stopped by {name}; saved after step \d+", printed)
    assert "Traceback" not in printed


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_signal_of_either_kind_leaves_at_once(second):
    code = (
        "import os, signal, time; from minigpt.trainer import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert signals.first() == signal.SIGINT\n"
        f"    os.kill(os.getpid(), signal.{second}); time.sleep(60); print('still here')"
    )
    ran = python("-c", code, cwd=ROOT)
    assert ran.returncode == -getattr(signal, second)
    assert ran.stdout == ""


def test_interrupted_three_times_it_is_one_run(tmp_path, project_files):
    folder = prepared(tmp_path / "work", project_files, {"train": {"max_iters": 600, "eval_interval": 200}})
    for _ in range(3):
        before = set(states(folder))
        process = start_training(folder)
        assert wait_for(lambda: set(states(folder)) - before, process), process.communicate()[0]  # noqa: B023
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    process = start_training(folder, MINIGPT_CHECKPOINT_SECONDS="30")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("minigpt").experiment_id])
    assert run.info.status == "FINISHED"
    assert re.fullmatch(r"3 times, after steps \d+, \d+, \d+", run.data.tags["resumed"])
    losses = client.get_metric_history(run.info.run_id, "val_loss")
    assert [metric.step for metric in losses] == [0, 200, 400, 600]
    assert len({file.path for file in client.list_artifacts(run.info.run_id)}) == 3  # model, train, params.yaml


def test_changed_params_start_afresh_and_say_so(tmp_path, project_files):
    folder = prepared(tmp_path / "work", project_files)
    process = start_training(folder)
    assert wait_for(lambda: states(folder), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    set_params(folder, {"model": {"n_embd": 24}, "train": {"max_iters": 10}})
    changed = start_training(folder)
    printed, _ = changed.communicate(timeout=120)
    assert changed.returncode == 0
    assert "starts afresh: the unfinished trainings here are of other params, data or code" in printed
    assert '"n_embd": 24' in (folder / "models/gpt/config.json").read_text()


def test_a_second_trainer_is_told_who_is_at_it(tmp_path, project_files, undisturbed):
    folders = [prepared(tmp_path / name, project_files) for name in "ab"]
    root = str(tmp_path / "a")
    first = start_training(folders[0], DVC_ROOT=root)
    assert wait_for(lambda: states(folders[0]), first)
    first.send_signal(signal.SIGSTOP)  # or it may be done before the second begins
    second = start_training(folders[1], DVC_ROOT=root)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"process {first.pid} is training exactly this already" in printed
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert outcome(folders[0]) == undisturbed


def test_of_two_equal_experiments_one_trains_and_the_next_goes_on(repository, undisturbed):
    def experiment(name):
        return start("dvc", "exp", "run", "--temp", "--name", name, "train", cwd=repository)

    first = experiment("first")
    assert wait_for(lambda: states(repository), first), first.communicate()[0]
    os.kill(trainer(repository), signal.SIGSTOP)  # or it may be done before the second begins
    second = experiment("second")
    printed, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert "is training exactly this already" in printed
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    third = experiment("third")
    printed, _ = third.communicate(timeout=300)
    assert third.returncode == 0, printed
    assert "goes on after step" in printed
    command("dvc", "exp", "apply", "third", cwd=repository)  # fails for what has not been made yet, after all else
    assert outcome(repository) == undisturbed


def test_intervals_change_no_weight(tmp_path, project_files, undisturbed):
    folder = prepared(tmp_path / "work", project_files)
    process = start_training(folder, MINIGPT_CHECKPOINT_SECONDS="1000", MINIGPT_CHECKPOINT_STEPS="7")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert outcome(folder) == undisturbed


FULL_AT = {"checkpoint": ".checkpoints", "model": "models", "history": "results", "journal": ".journal"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("what", FULL_AT if FULL else ["checkpoint", "model"])
def test_a_full_disk_tears_nothing_and_goes_on_with_space(tmp_path, project_files, undisturbed, what):
    folder = prepared(tmp_path / "work", project_files)
    place = folder / FULL_AT[what]
    place.mkdir()
    size = {"checkpoint": "150k", "model": "16k", "history": "4k", "journal": "8k"}[what]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        process = start_training(folder)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 1, printed
        assert "No space left on device" in printed
        assert "Traceback" not in printed
        assert not [path for path in place.rglob("*.safetensors") if "step-" not in str(path)]
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        again = start_training(folder)
        printed, _ = again.communicate(timeout=300)
        assert again.returncode == 0, printed
        assert outcome(folder) == undisturbed
        assert not list(folder.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", place], check=True)


def test_mutated_params_are_accepted_or_one_clear_message(tmp_path):
    """Values, keys and bytes of a params file changed at random: valid, or a message; never a traceback."""
    import yaml

    from minigpt.errors import UserError
    from minigpt.params import load

    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8")
    tree = overlay(yaml.safe_load(shipped), SMALL)
    chance, messages, count = random.Random(0), [], 2000
    odd = [
        None,
        True,
        -1,
        0,
        1,
        7,
        10**30,
        1e-9,
        float("inf"),
        float("nan"),
        "",
        "abc",
        "रोज",
        [],
        ["\n"],
        {},
        {"a": 1},
        b"x",
    ]
    path = tmp_path / "params.yaml"
    for _ in range(count):
        if chance.random() < 0.5:
            changed = overlay(tree, {})
            for _ in range(chance.randint(1, 3)):
                section = chance.choice(list(changed))
                if chance.random() < 0.1 or not isinstance(changed[section], dict):
                    changed[section] = chance.choice(odd)
                else:
                    key = chance.choice([*changed[section], "n_embed", "x"])
                    changed[section] = changed[section] | {key: chance.choice(odd)}
            path.write_text(yaml.dump(changed), encoding="utf-8")
        else:
            data = bytearray(shipped.encode())
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data)
        try:
            load(path)
        except UserError as error:
            messages.append(str(error))
    print(f"{count} mutated files: {len(messages)} refused with a message, {count - len(messages)} accepted")
    assert len(messages) > count / 4
    assert all(str(path) in message for message in messages)
