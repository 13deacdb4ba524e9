import itertools
import json
import subprocess
import sys

import pytest
import torch
from helpers.workspace import FULL, ROOT
from safetensors.torch import load_file

from minigpt.data import encode
from minigpt.errors import UserError
from minigpt.runtime import distributed
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
from minigpt.model import evaluation_mode
from minigpt.training.trainer import Trainer

torch.set_num_threads(1)
name, checkpoints, stop = sys.argv[1:4]
train = {{"grad_accum": 4, "grad_clip": 0.05, "row_norm": True, "dtype": "float32"}} | json.loads(sys.argv[4])
folder = Path(__file__).parent

class StoppingTrainer(Trainer):
    def train_step(self, step, request=0):
        if step == int(stop) and group.rank == group.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().train_step(step, request)

params = params_with(model={{"init": "normal", "tied_head": "tied" in name}}, train=train)
with distributed.join_process_group("cpu", 4, params.train.parallel) as group:
    assert group.broadcast_object(group.rank) == 0
    assert group.all_reduce_max(group.rank) == group.world_size - 1
    tensors = [torch.full((2,), float(group.rank)), torch.tensor(group.rank)]
    group.broadcast_tensors(tensors)
    assert not any(tensor.any() for tensor in tensors)
    torch.set_default_dtype(torch.float32 if "bitwise" in name else torch.float64)
    corpus = dataset.load_corpus(folder)
    trainer = StoppingTrainer(params, corpus, group, None, Checkpoints(folder / checkpoints, "f00d"))
    if name == "cache":
        with torch.no_grad(), evaluation_mode(trainer.model):
            for weight in trainer.model.parameters():
                weight.mul_(20)
            ids, cache = torch.arange(8)[None], trainer.model.make_cache(1)
            cached = torch.cat([trainer.model(ids[:, i : i + 1], cache) for i in range(8)], 1)
            torch.testing.assert_close(cached, trainer.model(ids), rtol=0.05, atol=0.1)
        sys.exit(0)
    scores = [score(trainer.model, corpus.val, stride, group=group) for stride in (None, 5)]
    try:
        result = trainer.run()
    except Interrupted:
        sys.exit(0)
    if group.is_main:
        weights = {{key: value.clone() for key, value in result.weights.items()}}
        save_file(weights, folder / f"{{name}}.safetensors")
        record = {{
            "history": result.history,
            "samples": result.samples,
            "scores": [s.sums for s in scores],
            "resumed_at": trainer.state.resumed_at,
        }}
        (folder / f"{{name}}.json").write_text(json.dumps(record))
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Function that trains with ``world_size`` processes and returns the weights and a record of the training."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    encode.encode_corpus(folder / "a.txt", 0.1, folder)
    (folder / "job.py").write_text(JOB.format(root=str(ROOT)))

    def train(name, world_size, checkpoints="", stop=-1, **changes):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        ran = subprocess.run(
            [sys.executable, *launch, "job.py", name, checkpoints or name, str(stop), json.dumps(changes)],
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
def single(train):
    return train("single", 1)


def assert_same_training(result, expected):
    """Compare weights and losses to 1e-11 (of a matrix's norm), and scores before the training to 1e-12."""
    for name, weight in expected[0].items():
        assert (result[0][name] - weight).norm() <= 1e-11 * weight.norm(), name
    assert result[1]["samples"] == expected[1]["samples"]
    for row, other in zip(result[1]["history"], expected[1]["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-11)
    for sums, other in zip(result[1]["scores"], expected[1]["scores"], strict=True):
        assert sums == pytest.approx(other, rel=1e-12)


def test_two_processes_train_bitwise_the_same_weights_as_one(train):
    (one, _), (two, _) = (train(f"bitwise-{world_size}", world_size, grad_accum=2) for world_size in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel, world_size", itertools.product(["ddp", "fsdp"], [2, 4]) if FULL else [("ddp", 4), ("fsdp", 2)]
)
def test_world_size_does_not_change_the_result(train, single, parallel, world_size):
    checkpointing = parallel == "fsdp"
    result = train(f"{parallel}-{world_size}", world_size, parallel=parallel, activation_checkpointing=checkpointing)
    assert_same_training(result, single)


@pytest.mark.slow
def test_sharded_model_writes_to_its_cache(train):
    train("cache", 2, stop=1, parallel="fsdp", dtype="bfloat16")


@pytest.mark.slow
def test_sharded_training_with_a_tied_head_resumes(train):
    checkpoints = "tied-2-1"
    train(checkpoints, 2, checkpoints=checkpoints, stop=6, parallel="fsdp")
    result = train(checkpoints, 1, checkpoints=checkpoints, parallel="fsdp")
    assert result[1]["resumed_at"] == [8]
    assert_same_training(result, train("tied", 1))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world_sizes, step", [((2, 1), 8), ((1, 2), 7)] if FULL else [((2, 1), 8)])
def test_training_resumes_with_another_world_size(train, single, parallel, world_sizes, step):
    before, after = world_sizes
    name = f"{parallel}-{before}-{after}"
    train(name, before, checkpoints=name, stop=6, parallel=parallel)
    result = train(name, after, checkpoints=name, parallel=parallel)
    assert result[1]["resumed_at"] == [step]
    assert_same_training(result, single)


def test_ranks_share_the_micro_batches_of_a_step_equally():
    shares = [list(ProcessGroup(rank, 3, torch.device("cpu")).micro_batches(6)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(6))
    assert {len(share) for share in shares} == {2}


@pytest.mark.parametrize(
    "world_size, device, message",
    [
        (3, "cpu", r"train\.grad_accum: 4 micro-batches cannot be shared equally by 3 processes"),
        (2, "cuda:0", r"train\.device: cuda:0 is a single device, but there are 2 processes"),
    ],
)
def test_params_that_do_not_fit_the_world_size_are_rejected(monkeypatch, world_size, device, message):
    for name, value in {"WORLD_SIZE": world_size, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=message), distributed.join_process_group(device, 4):
        pass


def test_world_size_without_a_job_is_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(
            UserError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; start the proc"
        ),
        distributed.join_process_group("cpu", 2),
    ):
        pass
