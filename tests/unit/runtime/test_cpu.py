import json
import subprocess
import sys

import pytest
from helpers.workspace import ROOT, python

from minigpt.runtime import cpu

SETTLE = """
import ctypes, json, os, resource
from minigpt.runtime import cpu
cpu.configure_cpu(spin=bool(os.environ.get("ALERT")))
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
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults, {name: os.environ[name] for name in os.environ if name.startswith("OMP_")}]), flush=True)
"""


def settled(tmp_path, **variables):
    ran = python("-c", SETTLE, cwd=ROOT, TMPDIR=str(tmp_path), **variables)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_threads_are_bound_unless_somebody_said_otherwise(tmp_path):
    assert settled(tmp_path)[1] == {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    assert settled(tmp_path, MINIGPT_CPU="off")[1] == {}
    assert settled(tmp_path, OMP_WAIT_POLICY="active")[1] == {"OMP_WAIT_POLICY": "active"}


def test_the_second_process_does_not_bind_its_threads(tmp_path):
    first = (
        "import os, subprocess, sys; from minigpt import process; cpu.place_threads();"
        "bound = {name: os.environ.pop(name) for name in ('OMP_PROC_BIND', 'OMP_PLACES')};"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    ran = python("-c", first, SETTLE, cwd=ROOT, TMPDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[1] == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.skipif(sys.platform != "linux" or len(cpu.cores()) < 2, reason="there is nothing to be bound to")
def test_a_thread_that_torch_has_bound_is_unbound_for_a_gpu(tmp_path):
    code = (
        "from minigpt import process; here = cpu.cores(); cpu.configure_cpu(); import torch; torch.ones(9).sum();"
        "bound = cpu.cores(); cpu.unbind(); print([here, bound, cpu.cores()])"
    )
    ran = python("-c", code, cwd=ROOT, TMPDIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    here, bound, unbound = json.loads(ran.stdout)
    assert len(bound) == 1
    assert unbound == here == cpu.cores()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux")
def test_freed_memory_is_kept(tmp_path):
    pages = 10 * (1 << 26) // 4096
    assert settled(tmp_path)[0] < pages / 100
    assert settled(tmp_path, MINIGPT_CPU="off")[0] > pages / 600  # given back, in small pages or in huge ones


def test_threads_that_write_stay_awake(tmp_path):
    assert settled(tmp_path, ALERT="yes")[1]["OMP_WAIT_POLICY"] == "active"
    assert "OMP_WAIT_POLICY" not in settled(tmp_path)[1]


WORKER = """
import os, subprocess, sys
input()
child = "from minigpt import process; cpu.keep_to_share(); print(cpu.cores())"
subprocess.run([sys.executable, "-c", child], env=os.environ | {"DVC_STAGE": "train"}, check=True)
input()
"""


@pytest.mark.skipif(sys.platform != "linux" or len(cpu.cores()) < 2, reason="there is nothing to share out")
def test_workers_of_a_queue_and_processes_of_a_job_share_the_cores_out():
    def worker(name):
        named = [sys.executable, "-u", "-c", WORKER, "exp", "queue-worker", f"{name}@localhost"]
        return subprocess.Popen(named, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    workers = [worker(name) for name in ("dvc-exp-a-1", "dvc-exp-a-2", "dvc-exp-b-1")]  # the last is of another queue
    shares = []
    for one in workers:
        one.stdin.write("\n")
        one.stdin.flush()
        shares.append(json.loads(one.stdout.readline()))
    for one in workers:
        one.communicate("\n")
    here = cpu.cores()
    half = len(here) // 2
    assert shares == [here[:half], here[half : 2 * half], here]
    code = "from minigpt import process; cpu.keep_to_share(); print(cpu.cores())"
    ran = python("-c", code, cwd=ROOT, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert json.loads(ran.stdout) == here[half : 2 * half]
