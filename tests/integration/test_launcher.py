"""Jobs of several processes, on one host and on two hosts: start, failure, kill and resume."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.trainings import LONG, prepare, saved_checkpoints, start, trained_result, wait_for
from helpers.workspace import FULL, make_repository, python, set_params

TWO_PROCESSES = {"train": LONG["train"] | {"processes": 2, "grad_accum": 2, "dtype": "float32"}}
SINGLE_PROCESS = {"train": TWO_PROCESSES["train"] | {"processes": 1}}
BROKEN_STAGE = """
import sys
from minigpt import errors, program
from minigpt.runtime import distributed, launcher

def main():
    if launcher.launch("stages.broken", 2):
        return
    with distributed.join_process_group("cpu", 2) as group:
        group.all_reduce_sum(__import__("torch").ones(1))
        if group.rank == 1:
            {failure}
        for _ in range(100):
            group.all_reduce_sum(__import__("torch").ones(1))

if __name__ == "__main__":
    program.run(main)
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory, project_files):
    """Result of an uninterrupted training in one process, with the same micro-batches."""
    folder = prepare(tmp_path_factory.mktemp("expected") / "work", project_files)
    set_params(folder, SINGLE_PROCESS)
    ran = start(sys.executable, "-m", "stages.train", cwd=folder)
    printed, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0, printed
    return trained_result(folder)


@pytest.fixture
def folder(tmp_path, project_files):
    folder = prepare(tmp_path / "work", project_files)
    set_params(folder, TWO_PROCESSES)
    return folder


def ranks_of(launcher):
    """Return the pids of the ranks that ``launcher`` has started, rank 0 first."""
    return sorted(child.pid for child in psutil.Process(launcher.pid).children())


def run(folder, *program, **variables):
    process = start(*(program or (sys.executable, "-m", "stages.train")), cwd=folder, **variables)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{}, *([{"MINIGPT_LAUNCH": "torchrun --standalone --nproc-per-node 2"}] if FULL else [])]
)
def test_dvc_repro_with_two_processes_trains_the_same_weights_as_one(tmp_path, project_files, expected, variables):
    repository = make_repository(
        tmp_path / "repository", project_files, LONG, SINGLE_PROCESS if variables else TWO_PROCESSES
    )
    code, printed = run(repository, "dvc", "repro", "train", **variables)
    assert code == 0, printed
    assert trained_result(repository) == expected
    assert printed.count("parameters in float32 on CPU, 1 thread") == 1
    assert printed.count("characters, in 2 processes") == 1
    assert printed.count("step      0   train") == 1


DISK_MISSING = "raise errors.UserError('the disk of this host is missing')"


@pytest.mark.parametrize("failure", ["1 / 0", pytest.param(DISK_MISSING, marks=pytest.mark.slow)])
def test_only_the_process_that_fails_reports_an_error(folder, failure):
    (folder / "stages/broken.py").write_text(BROKEN_STAGE.format(failure=failure))
    code, printed = run(folder, sys.executable, "-m", "stages.broken")
    assert code == 1
    lines = [line for line in printed.splitlines() if "Warning" not in line]
    assert lines[0].startswith("minigpt: rank 1 of 2, on "), printed
    assert "rank 0" not in printed
    if failure == "1 / 0":
        assert lines[-1] == "ZeroDivisionError: division by zero"
    else:
        assert lines[0].endswith(": the disk of this host is missing")
        assert "Traceback" not in printed


@pytest.mark.slow
def test_error_in_all_processes_is_reported_once(folder):
    set_params(folder, {"train": {"learning_rate": 1e9, "adam_learning_rate": 1e9}})
    code, printed = run(folder)
    assert code == 1
    assert printed.count("training diverged") == 1
    assert "Traceback" not in printed


VICTIMS = [("stages.train", 1), ("torchrun", 0), *([("stages.train", 0), ("torchrun", 1)] if FULL else [])]
"""Programs, and the ranks that are killed."""


@pytest.mark.slow
@pytest.mark.parametrize("program, rank", VICTIMS)
def test_job_restarts_after_a_process_is_killed(tmp_path, project_files, expected, program, rank):
    torchrun = ("torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "stages.train")
    for trial in range(5 if FULL else 1):
        folder = prepare(tmp_path / str(trial), project_files)
        set_params(folder, TWO_PROCESSES)
        command = torchrun if program == "torchrun" else (sys.executable, "-m", program)
        process = start(*command, cwd=folder)
        assert wait_for(lambda: saved_checkpoints(folder), process), process.communicate()[0]  # noqa: B023
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        assert trained_result(folder) == expected, printed
        assert "resuming after step" in printed
        if program == "stages.train":
            assert f"rank {rank} of 2" in printed
            assert "was killed by SIGKILL; restarting the job from its last checkpoint" in printed


@pytest.mark.slow
def test_killed_job_of_two_processes_resumes_in_one_process(folder, expected):
    process = start(sys.executable, "-m", "stages.train", cwd=folder)
    assert wait_for(lambda: saved_checkpoints(folder), process), process.communicate()[0]
    for pid in (*ranks_of(process), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    set_params(folder, SINGLE_PROCESS)
    code, printed = run(folder)
    assert code == 0, printed
    assert "resuming after step" in printed
    assert trained_result(folder) == expected


STOPS = ["SIGINT to all", "SIGKILL to the launcher", *(["SIGTERM to the launcher"] if FULL else [])]


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_stopped_job_saves_and_resumes_in_one_process(folder, expected, how):
    process = start(sys.executable, "-m", "stages.train", cwd=folder)
    assert wait_for(lambda: saved_checkpoints(folder), process), process.communicate()[0]
    ranks = ranks_of(process)
    assert len(ranks) == 2
    if how == "SIGINT to all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM if "TERM" in how else signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT to all": 130, "SIGTERM to the launcher": 143}.get(how, -9)
    assert "Traceback" not in printed
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, ranks))
    assert printed.count("; saved after step") == 1
    set_params(folder, SINGLE_PROCESS)
    code, printed = run(folder)
    assert code == 0, printed
    assert "resuming after step" in printed
    assert trained_result(folder) == expected


def test_processes_that_cannot_share_a_step_equally_are_rejected(folder):
    set_params(folder, {"train": {"processes": 3}})
    ran = python("-m", "stages.train", cwd=folder)
    assert ran.returncode == 1
    assert "train.processes: must divide grad_accum into equal parts" in ran.stderr
    assert "set train.grad_accum to 3" in ran.stderr


class Hosts:
    """Two hosts: network namespaces with one address each, connected by a virtual cable."""

    def __init__(self) -> None:
        self.names = [f"minigpt-{os.getpid()}-{index}" for index in range(2)]

    def __enter__(self):
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "cable", "netns", self.names[1])
        for index, name in enumerate(self.names):
            self.ip("-n", name, "address", "add", f"10.77.0.{index + 1}/24", "dev", "cable")
            self.ip("-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(self, *error):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def disconnect(self):
        self.ip("-n", self.names[1], "link", "set", "cable", "down")

    def reconnect(self):
        self.ip("-n", self.names[1], "link", "set", "cable", "up")

    def start(self, folders):
        """Start torchrun on each host, in a folder of its own; the first host runs the rendezvous."""
        rendezvous = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job")
        endpoint = ("--rdzv-endpoint", "10.77.0.1:29400")
        return [
            start(
                *("ip", "netns", "exec", name, "torchrun", *rendezvous, *endpoint),
                *("--local-addr", f"10.77.0.{index + 1}"),
                *("--rdzv-conf", f"is_host={1 - index}"),  # without a name server, torchrun cannot find out
                *("-m", "stages.train"),
                cwd=folder,
                GLOO_SOCKET_IFNAME="cable",
                MINIGPT_PEER_SECONDS="15",
            )
            for index, (name, folder) in enumerate(zip(self.names, folders, strict=True))
        ]


def can_create_hosts():
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"minigpt-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_create_hosts(), reason="network namespaces need Linux, iproute2 and root")
def test_job_resumes_after_one_of_two_hosts_is_disconnected_and_killed(tmp_path, project_files, expected):
    folders = [prepare(tmp_path / name, project_files) for name in ("first", "second")]
    for folder in folders:
        set_params(folder, SINGLE_PROCESS)  # torchrun decides on the number of processes
    with Hosts() as hosts:
        first, second = hosts.start(folders)
        assert wait_for(lambda: saved_checkpoints(folders[0]), first), first.communicate()[0]
        hosts.disconnect()
        os.killpg(second.pid, signal.SIGKILL)
        second.communicate(timeout=30)
        printed, _ = first.communicate(timeout=120)
        assert first.returncode == 1
        assert "minigpt: rank 0 of 2, on " in printed
        assert "another process has failed or cannot be reached" in printed
        assert "run the same command to resume from the last checkpoint" in printed
        hosts.reconnect()
        first, second = hosts.start(folders)
        printed, _ = first.communicate(timeout=300)
        second.communicate(timeout=60)
        assert first.returncode == second.returncode == 0, printed
    assert "resuming after step" in printed
    assert trained_result(folders[0]) == expected
    assert not saved_checkpoints(folders[1])
