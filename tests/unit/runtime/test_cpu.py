import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from helpers.workspace import ROOT, python

from minigpt.runtime import cpu

SEVERAL_CORES = pytest.mark.skipif(
    sys.platform != "linux" or len(cpu.available_cores()) < 2, reason="needs Linux and two cores"
)
BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
UNBOUND = {"OMP_WAIT_POLICY": "passive"}

PRINT_PAGE_FAULTS = """
import ctypes, os, resource
from minigpt.runtime import cpu
cpu.configure_cpu()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def touch():
    block = libc.malloc(1 << 26)
    libc.memset(block, 1, 1 << 26)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PRINT_OMP_SETTINGS = """
import json, os, sys
from minigpt.runtime import cpu
cpu.configure_cpu(spin="spin" in sys.argv)
names = {"OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY"} & set(os.environ)
print(json.dumps({name: os.environ[name] for name in names}), flush=True)
if "wait" in sys.argv:
    input()
"""


def run_json(code, *arguments, **variables):
    """Run a program and return the JSON value that it prints."""
    ran = python("-c", code, *arguments, cwd=ROOT, **variables)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def omp_settings(folder, *arguments, **variables):
    """Return the OpenMP settings of a new process that has its locks in ``folder``."""
    return run_json(PRINT_OMP_SETTINGS, *arguments, TMPDIR=str(folder), XDG_RUNTIME_DIR=str(folder), **variables)


@pytest.fixture
def binding_process(tmp_path):
    """Process that has bound its threads and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT_OMP_SETTINGS, "wait"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert json.loads(process.stdout.readline()) == BOUND
    yield process
    process.kill()
    process.communicate()


def test_threads_are_bound_unless_the_environment_overrides_it(tmp_path):
    assert omp_settings(tmp_path) == BOUND
    assert omp_settings(tmp_path, MINIGPT_CPU="off") == {}
    assert omp_settings(tmp_path, OMP_WAIT_POLICY="active") == {"OMP_WAIT_POLICY": "active"}


def test_threads_of_generation_spin(tmp_path):
    assert omp_settings(tmp_path, "spin") == BOUND | {"OMP_WAIT_POLICY": "active"}


def test_second_process_leaves_its_threads_unbound_until_the_first_is_killed(tmp_path, binding_process):
    assert omp_settings(tmp_path) == UNBOUND
    binding_process.send_signal(signal.SIGKILL)
    binding_process.wait()
    assert omp_settings(tmp_path) == BOUND


def make_link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def make_open_folder(path):
    path.mkdir()
    path.chmod(0o777)


def make_folder_of_another_user(path):
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


def make_folder_with_a_folder_as_lock(path):
    (path / f"core-{cpu.available_cores()[-1]}.lock").mkdir(parents=True)
    path.chmod(0o700)


OBSTACLES = [pathlib.Path.touch, make_link, make_open_folder, make_folder_with_a_folder_as_lock]
if os.geteuid() == 0:
    OBSTACLES.append(make_folder_of_another_user)


@pytest.mark.parametrize("make", OBSTACLES, ids=lambda make: make.__name__)
def test_process_that_cannot_take_the_locks_leaves_its_threads_unbound(tmp_path, make):
    make(tmp_path / f"minigpt-{os.getuid()}")
    assert omp_settings(tmp_path) == UNBOUND
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())


def test_missing_folder_for_temporary_files_costs_only_the_binding(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert not cpu.hold_locks(["a"])


def test_locks_are_in_a_folder_that_only_the_user_can_change(tmp_path, monkeypatch):
    for name, mode in (("session", 0o700), ("shared", 0o777)):
        folder = tmp_path / name
        folder.mkdir()
        folder.chmod(mode)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        found = cpu.runtime_folder()
        assert found.parent == (folder if mode == 0o700 else tmp_path)
        assert found.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_command_works_with_a_hostile_folder_for_temporary_files(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    for name in (f"minigpt-{os.getuid()}", *(f"minigpt-core-{c}-{os.getuid()}.lock" for c in cpu.available_cores())):
        (tmp_path / name).symlink_to(victim)
    variables = {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": ""}
    ran = python("-m", "minigpt", "write", "--model", str(tmp_path / "none"), cwd=ROOT, **variables)
    assert "Traceback" not in ran.stderr
    assert f"{tmp_path}/none" in ran.stderr  # it came as far as the model
    assert victim.read_text() == "content"


def test_locks_are_taken_together_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # inherited by the other processes
    take = "import sys; from minigpt.runtime import cpu; print('true' if cpu.hold_locks(sys.argv[1:]) else 'false')"
    assert cpu.hold_locks(["b"])
    assert not run_json(take, "a", "b", TMPDIR=str(tmp_path))
    assert not cpu.hold_locks(["a", "b"])
    assert run_json(take, "a", TMPDIR=str(tmp_path))


@SEVERAL_CORES
def test_a_thread_that_torch_has_bound_is_unbound_for_a_gpu(tmp_path):
    code = (
        "from minigpt.runtime import cpu; start = cpu.available_cores(); cpu.configure_cpu()\n"
        "import torch; torch.ones(9).sum(); bound = cpu.available_cores()\n"
        "cpu.unbind_threads(); unbound = cpu.available_cores(); import subprocess, sys\n"
        "child = 'import os, torch; torch.ones(9).sum(); print(len(os.sched_getaffinity(0)))'\n"
        "count = int(subprocess.check_output([sys.executable, '-c', child])); print([start, bound, unbound, count])"
    )
    start, bound, unbound, of_child = run_json(code, TMPDIR=str(tmp_path))
    assert len(bound) == 1
    assert unbound == start == cpu.available_cores()
    assert of_child == len(start)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_freed_memory_is_retained(tmp_path):
    pages = 10 * (1 << 26) // 4096
    assert run_json(PRINT_PAGE_FAULTS, TMPDIR=str(tmp_path)) < pages / 100
    returned = run_json(PRINT_PAGE_FAULTS, TMPDIR=str(tmp_path), MINIGPT_CPU="off")
    assert returned > pages / 600  # with huge pages, one fault for 512 pages


def test_ancestors_are_listed_from_parent_to_first_process():
    code = "import json; from minigpt.runtime import cpu; print(json.dumps(cpu.ancestors()))"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    (parent, name), (grandparent, _) = run_json(middle)[:2]
    assert grandparent == os.getpid() != parent
    assert "python" in name
    assert [pid for pid, _ in cpu.ancestors()][:1] == [os.getppid()]


QUEUE_WORKER = """
import os, subprocess, sys
input()
child = "from minigpt.runtime import cpu; cpu.limit_to_share(); print(cpu.available_cores())"
subprocess.run([sys.executable, "-c", child], env=os.environ | {"DVC_STAGE": "train"}, check=True)
input()
"""


@SEVERAL_CORES
def test_workers_of_a_queue_share_the_cores():
    def start(name):
        named = [sys.executable, "-u", "-c", QUEUE_WORKER, "exp", "queue-worker", f"{name}@localhost"]
        return subprocess.Popen(named, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    workers = [start(name) for name in ("dvc-exp-a-1", "dvc-exp-a-2", "dvc-exp-b-1")]  # two queues, a and b
    shares = []
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
        shares.append(json.loads(worker.stdout.readline()))
    for worker in workers:
        worker.communicate("\n")
    cores = cpu.available_cores()
    half = len(cores) // 2
    assert shares == [cores[:half], cores[half : 2 * half], cores]


@SEVERAL_CORES
def test_ranks_of_a_job_share_the_cores():
    code = "from minigpt.runtime import cpu; cpu.limit_to_share(); print(cpu.available_cores())"
    cores = cpu.available_cores()
    half = len(cores) // 2
    for rank in range(2):
        share = run_json(code, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        assert share == cores[rank * half : (rank + 1) * half]
