import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from minigpt import ranks
from minigpt.errors import UserError
from minigpt.ranks import Ranks, choose_device, compute_dtype

JOB = """
import hashlib, json, sys, torch
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import params_with
from minigpt import corpus, ranks
from minigpt.checkpoint import Checkpoints
from minigpt.trainer import Trainer
from minigpt.score import score
torch.set_num_threads(1)
folder = Path(sys.argv[1])
params = params_with(train={{"grad_accum": 2, "grad_clip": 0.5, "dtype": "float32"}})
with ranks.join("cpu", 2) as job:
    text = corpus.load(folder)
    outcome = Trainer(params, text, job, None, Checkpoints(folder / str(job.world), "f00d")).run()
    if job.first:
        weights = b"".join(outcome.weights[n].numpy().tobytes() for n in sorted(outcome.weights))
        (folder / f"{{job.world}}.json").write_text(json.dumps([hashlib.sha256(weights).hexdigest(), outcome.history]))
"""


def test_two_processes_train_what_one_does_bitwise(tmp_path):
    from minigpt import corpus

    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    corpus.encode(tmp_path / "a.txt", 0.1, tmp_path)
    (tmp_path / "job.py").write_text(JOB.format(root=str(ROOT)))
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        ran = subprocess.run(
            [sys.executable, *launch, tmp_path / "job.py", tmp_path], capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
    (one, alone), (two, together) = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    assert one == two
    for row, other in zip(alone, together, strict=True):
        assert row == pytest.approx(other, rel=1e-6)


def test_processes_share_the_micro_batches_of_a_step():
    cpu = torch.device("cpu")
    shares = [list(Ranks(rank, 3, cpu).micro_batches(6)) for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(6))
    assert {len(share) for share in shares} == {2}


def test_unequal_shares_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train\.grad_accum: 4 .* 3 processes"), ranks.join("cpu", 4):
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
