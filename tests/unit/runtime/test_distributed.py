import itertools
import json
import subprocess
import sys

import pytest
import torch
from helpers.workspace import ROOT
from safetensors.torch import load_file

from minigpt.data import encode
from minigpt.errors import UserError
from minigpt.runtime import distributed
from minigpt.runtime.device import choose_device, compute_dtype
from minigpt.runtime.distributed import ProcessGroup

JOB = """
import json, os, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from helpers.workspace import params_with
from minigpt.data import dataset, encode
from minigpt.runtime import distributed
from minigpt.training.checkpoint import Checkpoints
from minigpt.errors import Interrupted
from minigpt.evaluation.loss import score
from minigpt.training.trainer import Trainer

torch.set_num_threads(1)
name, kept, stop = sys.argv[1:4]
train = {{"grad_accum": 4, "grad_clip": 0.05, "dtype": "float32"}} | json.loads(sys.argv[4])
here = Path(__file__).parent

class Stopping(Trainer):
    def _step(self, step, wish=0):
        if step == int(stop) and job.rank == job.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._step(step, wish)

params = params_with(model={{"init": "normal"}}, train=train)
with distributed.join_process_group("cpu", 4, params.train.parallel) as job:
    torch.set_default_dtype(torch.float32 if "bitwise" in name else torch.float64)
    text = dataset.load_corpus(here)
    trainer = Stopping(params, text, job, None, Checkpoints(here / kept, "f00d"))
    exact = [score(trainer.model, text.val, stride, group=job) for stride in (None, 5)]
    try:
        outcome = trainer.run()
    except Interrupted:
        sys.exit(0)
    if job.is_main:
        save_file(outcome.weights, here / f"{{name}}.safetensors")
        facts = {{"history": outcome.history, "exact": [[s.nats, s.count, s.squares] for s in exact]}}
        (here / f"{{name}}.json").write_text(json.dumps(facts | {{"resumed_at": trainer.facts["resumed_at"]}}))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Trains in as many processes; gives weights and facts. Checkpoints are those of ``kept``, if it is named."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(folder / "a.txt", 0.1, folder)
    (folder / "job.py").write_text(JOB.format(root=str(ROOT)))

    def train(name, world, kept="", stop=-1, **changes):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        ran = subprocess.run(
            [sys.executable, *launch, "job.py", name, kept or name, str(stop), json.dumps(changes)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        if stop < 0:
            return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
        return None

    return train


@pytest.fixture(scope="module")
def alone(job):
    return job("alone", 1)


def assert_same(outcome, expected):
    """To 1e-11 of each weight matrix's norm, and of each loss; to 1e-12 of an exact evaluation before the training."""
    for name, weight in expected[0].items():
        assert (outcome[0][name] - weight).norm() <= 1e-11 * weight.norm(), name
    for row, other in zip(outcome[1]["history"], expected[1]["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-11)
    for (nats, count, squares), other in zip(outcome[1]["exact"], expected[1]["exact"], strict=True):
        assert count == other[1]
        assert nats == pytest.approx(other[0], rel=1e-12)
        assert squares == pytest.approx(other[2], rel=1e-6)


def test_two_processes_train_what_one_does_bitwise(job):
    (one, _), (two, _) = (job(f"bitwise-{world}", world, grad_accum=2) for world in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_changes_nothing(job, alone, parallel, world):
    outcome = job(f"{parallel}-{world}", world, parallel=parallel, activation_checkpointing=parallel == "fsdp")
    assert_same(outcome, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_state_goes_on_in_another_number_of_processes(job, alone, parallel):
    for worlds in ((2, 1), (1, 2)):
        name = f"{parallel}-{worlds}"
        job(name, worlds[0], kept=name, stop=6, parallel=parallel)
        outcome = job(name, worlds[1], kept=name, parallel=parallel)
        assert outcome[1]["resumed_at"] == [7 if worlds[0] == 1 else 8]
        assert_same(outcome, alone)


def test_processes_share_the_micro_batches_of_a_step():
    cpu = torch.device("cpu")
    shares = [list(ProcessGroup(rank, 3, cpu).micro_batches(6)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(6))
    assert {len(share) for share in shares} == {2}


def test_unequal_shares_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(UserError, match=r"train\.grad_accum: 4 .* 3 processes"),
        distributed.join_process_group("cpu", 4),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent_says_so():
    with pytest.raises(UserError, match=r"train\.device: cuda is asked for, but 0 CUDA devices are here"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_taken_when_there_is_one():
    assert choose_device("auto") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="CUDA devices are here"):
        choose_device("cuda:99")


def test_dtypes():
    cpu = torch.device("cpu")
    assert compute_dtype("float32", cpu) is None
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    "maker, amx, pairs, expected",
    [
        ("AuthenticAMD", False, True, torch.bfloat16),
        ("AuthenticAMD", False, False, None),
        ("GenuineIntel", False, True, None),
        ("GenuineIntel", True, True, torch.bfloat16),
    ],
)
def test_on_a_cpu_bfloat16_is_taken_where_it_is_the_faster(monkeypatch, maker, amx, pairs, expected):
    said = {"vendor_id": maker, "flags": "avx512f avx512_bf16" if pairs else "avx512f"}
    monkeypatch.setattr(distributed, "processor", lambda *fields: said[fields[0]])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)
    assert compute_dtype("auto", torch.device("cpu")) == expected
