"""Trainings in real processes that are killed, stopped and run out of disk space, and resume with the same result.

The slow tests have a short form; ``make torture`` sets TORTURE=full for all trials. Each test prints its counts.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.trainings import LONG, prepare, saved_checkpoints, start, start_training, trained_result, wait_for
from helpers.workspace import FULL, ROOT, SMALL, command, make_repository, overlay, set_params
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, project_files):
    """Return the result of a training that nothing interrupts."""
    folder = prepare(tmp_path_factory.mktemp("uninterrupted") / "work", project_files)
    ran = start_training(folder)
    printed, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0, printed
    return trained_result(folder)


@pytest.mark.slow
def test_training_killed_at_random_times_has_the_same_result(tmp_path, project_files, uninterrupted):
    trials, kills, in_save, through_dvc = (20 if FULL else 2), 0, 0, 0
    rng = random.Random(0)
    for trial in range(trials):
        if trial % 6:
            folder, program = prepare(tmp_path / str(trial), project_files), (sys.executable, "-m", "stages.train")
        else:
            folder, program = make_repository(tmp_path / str(trial), project_files, LONG), ("dvc", "repro", "train")
            through_dvc += 1
        for _ in range(3):
            process = start(*program, cwd=folder)
            if rng.random() < 0.5:  # during a save: as soon as its temporary folder exists
                in_save += wait_for(lambda: any((folder / ".checkpoints").glob("*/.step-*.tmp")), process)  # noqa: B023
            else:
                wait_for(lambda: saved_checkpoints(folder), process)  # noqa: B023
                time.sleep(rng.random() * 1.5)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.communicate()
        last = start(*program, cwd=folder)
        printed, _ = last.communicate(timeout=300)
        assert trained_result(folder) == uninterrupted, printed
    print(f"{trials} of {trials} equal the uninterrupted run after {kills} kills, {in_save} during a save;")
    print(f"{through_dvc} trials ran dvc repro")
    assert kills >= trials


@pytest.fixture
def repository(tmp_path, project_files):
    return make_repository(tmp_path / "repository", project_files, LONG)


def training_process(repository):
    """Return the pid of the process that trains in a repository."""
    return int(next((repository / ".checkpoints").glob("*.pid")).read_text())


def process_group_ended(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


INTERRUPTIONS = ["SIGINT to all", "SIGKILL to dvc alone", *(["SIGKILL to all", "SIGTERM to the stage"] if FULL else [])]


@pytest.mark.slow
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_dvc_repro_resumes_after_any_interruption(repository, uninterrupted, interruption):
    process = start("dvc", "repro", "train", cwd=repository)
    assert wait_for(lambda: saved_checkpoints(repository), process), process.communicate()[0]
    stage = training_process(repository)
    if interruption == "SIGKILL to dvc alone":
        os.kill(process.pid, signal.SIGKILL)
    elif interruption == "SIGTERM to the stage":
        os.kill(stage, signal.SIGTERM)
    else:
        os.killpg(process.pid, getattr(signal, interruption.split()[0]))
    printed, _ = process.communicate(timeout=60)
    for _ in range(600):  # a training notices within a second that DVC has died
        if process_group_ended(process.pid):
            break
        time.sleep(0.05)
    assert process_group_ended(process.pid)
    assert process.returncode != 0
    assert not (repository / "models/gpt").exists()
    assert "train:" not in ((repository / "dvc.lock").read_text() if (repository / "dvc.lock").exists() else "")
    if interruption == "SIGTERM to the stage":
        saved = re.search(r"stopped by SIGTERM; saved after step (\d+)", printed)
        assert f"step-{int(saved[1]):06d}" == saved_checkpoints(repository)[-1].parent.name
        assert "exited with 143" in printed
    again = start("dvc", "repro", "train", cwd=repository)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert "resuming after step" in printed
    assert trained_result(repository) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_saves_a_checkpoint_and_sets_the_exit_code(tmp_path, project_files, name, code):
    folder = prepare(tmp_path / "work", project_files, {"train": {"max_iters": 100_000}})
    process = start_training(folder, MINIGPT_CHECKPOINT_SECONDS="1000", MINIGPT_CHECKPOINT_STEPS="50")
    assert wait_for(lambda: saved_checkpoints(folder), process)
    os.kill(process.pid, getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert re.search(rf"stopped by {name}; saved after step \d+", printed)
    assert "Traceback" not in printed


@pytest.mark.slow
def test_training_interrupted_three_times_is_one_mlflow_run(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files, {"train": {"max_iters": 600, "eval_interval": 200}})
    for _ in range(3):
        before = set(saved_checkpoints(folder))
        process = start_training(folder)
        assert wait_for(lambda: set(saved_checkpoints(folder)) - before, process), process.communicate()[0]  # noqa: B023
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
    losses = client.get_metric_history(run.info.run_id, "loss/val")
    assert [metric.step for metric in losses] == [0, 200, 400, 600]
    assert len({file.path for file in client.list_artifacts(run.info.run_id)}) == 3  # model, train, params.yaml


@pytest.mark.slow
def test_changed_params_start_a_new_training(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files)
    process = start_training(folder)
    assert wait_for(lambda: saved_checkpoints(folder), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    set_params(folder, {"model": {"n_embd": 24}, "train": {"max_iters": 10}})
    changed = start_training(folder)
    printed, _ = changed.communicate(timeout=120)
    assert changed.returncode == 0
    assert "starting from step 0: the unfinished trainings here have other params, data or code" in printed
    assert '"n_embd": 24' in (folder / "models/gpt/config.json").read_text()


@pytest.mark.slow
def test_second_process_reports_the_pid_of_the_first(tmp_path, project_files, uninterrupted):
    folders = [prepare(tmp_path / name, project_files) for name in "ab"]
    root = str(tmp_path / "a")
    first = start_training(folders[0], DVC_ROOT=root)
    assert wait_for(lambda: saved_checkpoints(folders[0]), first)
    first.send_signal(signal.SIGSTOP)  # or it may end before the second one starts
    second = start_training(folders[1], DVC_ROOT=root)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"process {first.pid} is already running this training" in printed
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert trained_result(folders[0]) == uninterrupted


@pytest.mark.slow
def test_equal_experiments_share_one_training(repository, uninterrupted):
    def experiment(name):
        return start("dvc", "exp", "run", "--temp", "--name", name, "train", cwd=repository)

    first = experiment("first")
    assert wait_for(lambda: saved_checkpoints(repository), first), first.communicate()[0]
    os.kill(training_process(repository), signal.SIGSTOP)  # or it may end before the second one starts
    second = experiment("second")
    printed, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert "is already running this training" in printed
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    third = experiment("third")
    printed, _ = third.communicate(timeout=300)
    assert third.returncode == 0, printed
    assert "resuming after step" in printed
    command(
        "dvc", "exp", "apply", "third", cwd=repository
    )  # applies all files, then fails because later stages have not run
    assert trained_result(repository) == uninterrupted


@pytest.mark.slow
def test_checkpoint_interval_does_not_affect_the_result(tmp_path, project_files, uninterrupted):
    folder = prepare(tmp_path / "work", project_files)
    process = start_training(folder, MINIGPT_CHECKPOINT_SECONDS="1000", MINIGPT_CHECKPOINT_STEPS="7")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert trained_result(folder) == uninterrupted


DISKS = {"checkpoint": ".checkpoints", "model": "models", "history": "results", "journal": ".journal"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("content", DISKS if FULL else ["checkpoint", "model"])
def test_training_resumes_after_a_full_disk(tmp_path, project_files, uninterrupted, content):
    folder = prepare(tmp_path / "work", project_files)
    disk = folder / DISKS[content]
    disk.mkdir()
    size = {"checkpoint": "150k", "model": "16k", "history": "4k", "journal": "8k"}[content]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        process = start_training(folder)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 1, printed
        assert "No space left on device" in printed
        assert "Traceback" not in printed
        assert not [path for path in disk.rglob("*.safetensors") if "step-" not in str(path)]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = start_training(folder)
        printed, _ = again.communicate(timeout=300)
        assert again.returncode == 0, printed
        assert trained_result(folder) == uninterrupted
        assert not list(folder.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_mutated_params_are_accepted_or_rejected_with_one_message(tmp_path):
    """Values, keys and bytes of a params file are changed at random."""
    import yaml

    from minigpt.errors import UserError
    from minigpt.params import load

    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8")
    tree = overlay(yaml.safe_load(shipped), SMALL)
    rng, messages, count = random.Random(0), [], 2000 if FULL else 400
    odd_values = [
        None, True, -1, 0, 1, 7, 10**30, 1e-9, float("inf"), float("nan"),
        "", "abc", "रोज", [], ["\n"], {}, {"a": 1}, b"x",
    ]  # fmt: skip
    path = tmp_path / "params.yaml"
    for _ in range(count):
        if rng.random() < 0.5:
            changed = overlay(tree, {})
            for _ in range(rng.randint(1, 3)):
                section = rng.choice(list(changed))
                if rng.random() < 0.1 or not isinstance(changed[section], dict):
                    changed[section] = rng.choice(odd_values)
                else:
                    key = rng.choice([*changed[section], "n_embed", "x"])
                    changed[section] = changed[section] | {key: rng.choice(odd_values)}
            path.write_text(yaml.dump(changed), encoding="utf-8")
        else:
            data = bytearray(shipped.encode())
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
        try:
            load(path)
        except UserError as error:
            messages.append(str(error))
    print(f"{count} mutated files: {len(messages)} rejected with a message, {count - len(messages)} accepted")
    assert len(messages) > count / 4
    assert all(str(path) in message for message in messages)
