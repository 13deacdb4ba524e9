"""Checkpoints that a training resumes from.

Tensors are stored as safetensors and everything else as JSON: nothing is unpickled, so loading executes no code. A
sharded model is written with torch's distributed checkpoint, one file per rank, so its ranks must share a disk.
Any number of ranks, sharded or not, can resume from the checkpoint of any other number.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigpt.errors import UserError
from minigpt.export import unshared, write_tensors
from minigpt.files import (
    atomic_directory,
    read_json,
    read_run_key,
    remove,
    remove_unless_file,
    write_atomically,
    write_json,
)
from minigpt.params import Params
from minigpt.runtime.cpu import queue_worker
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from minigpt.training.initial import weights_digest

TRAINING_CODE = (  # what training imports of the library: the same as in the dependencies of the stage train
    "training", "evaluation/loss.py", "generation/sampling.py", "data", "runtime/cpu.py", "runtime/device.py",
    "runtime/distributed.py", "export.py", "model.py", "cache.py", "ops.py", "params.py", "choices.py", "errors.py",
    "files.py",
)  # fmt: skip


def fingerprint(params: Params, corpus_digest: str) -> str:
    """Return 16 hexadecimal digits that identify a training by its params, data and code."""
    package = Path(__file__).parents[1]
    files = [file for name in TRAINING_CODE for file in (sorted((package / name).rglob("*.py")) or [package / name])]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    # These decide where a training is computed, not its result. They may change between stop and resume.
    train = params.train.model_dump(exclude={"processes", "parallel", "activation_checkpointing"})
    identity = [params.model.model_dump(), train, corpus_digest, code, torch.__version__]
    if params.train.init_from:
        identity.append(weights_digest(Path(params.train.init_from)))
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@dataclass
class TrainState:
    """Progress of a training, except for its tensors."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    step: int = 0  # optimizer steps done
    saved_step: int = 0  # step of the newest checkpoint
    best_step: int = 0  # step of the lowest validation loss
    best_loss: float = math.inf  # that loss in nats per character
    evaluations_since_best: int = 0
    grad_norm: float = 0.0  # of the last step, before clipping
    loss_scale: float = 2.0**16  # see scaling.py; used with float16 only
    good_steps: int = 0  # steps with finite gradients since the loss scale changed
    train_seconds: float = 0.0  # without evaluations and checkpoints
    resumed_at: list[int] = field(default_factory=list)  # steps after which the training was resumed
    history: list[dict[str, float]] = field(default_factory=list)  # one row per evaluation
    batches: list[dict[str, float]] = field(default_factory=list)  # step and mean loss of the batches up to it
    recent_losses: list[float] = field(default_factory=list)  # of the batches after the last row
    samples: list[dict[str, Any]] = field(default_factory=list)  # step, prompt and text of each sample


@dataclass
class Checkpoint:
    """A training at the end of a step: weights, best weights and optimizer state by name, and all other state."""

    tensors: dict[str, Tensor]
    state: TrainState


class Checkpoints:
    """The last checkpoints of one training, in ``<root>/.checkpoints/<fingerprint>/step-NNNNNN/``.

    ``root`` is the main workspace, which outlives the copies that DVC runs experiments in.
    """

    KEEP = 2

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.folder = root / ".checkpoints" / fingerprint
        self.started_before = False  # set by `run_key`: an earlier process has started this training

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running this training. The death of this one frees the lock.

        If another process runs it, a worker of DVC's queue waits; otherwise raise UserError.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        paths = self.folder.with_suffix(".lock"), self.folder.with_suffix(".pid")
        for path in paths:
            remove_unless_file(path)
        lock, holder = FileLock(paths[0]), paths[1]
        try:
            lock.acquire(blocking=False)
        except Timeout:
            pid = holder.read_text(errors="replace").strip() if holder.is_file() else ""
            known = pid.isdecimal()
            name, way_out = (f"process {pid}", f", or stop it with `kill {pid}`") if known else ("a process", "")
            if queue_worker()[1] == 1:
                raise UserError(f"{name} is already running this training; wait for it{way_out}") from None
            # Of two experiments in a queue, params of later stages may be the only difference.
            print(f"minigpt: waiting for {name}, which runs the same training", flush=True)
            lock.acquire(poll_interval=1)
        try:
            holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield
        finally:
            lock.release()

    def run_key(self) -> str:
        """Return 32 hexadecimal digits that identify the run from the first start of this training to its end.

        If the file that stores them is damaged, the training continues as a new run.
        """
        path = self.folder / "run.json"
        if not self.folder.is_dir():
            remove(self.folder)
        self.started_before = path.exists()
        try:
            return read_run_key(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            print(f"minigpt: {path}: damaged: {error}; the training continues as a new MLflow run", file=sys.stderr)
        key = uuid.uuid4().hex
        write_atomically(path, json.dumps({"run": key}).encode())
        return key

    def save(self, checkpoint: Checkpoint, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Write a checkpoint, then remove all but the last KEEP. All ranks must call.

        Only rank 0 writes, unless the model is sharded: then each rank writes its own shards.
        """
        if not group.is_main and not group.sharded:
            return
        target = self._step_folder(checkpoint.state.step)
        with atomic_directory(target) if group.is_main else nullcontext(target) as folder:
            if group.sharded:
                from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
                from torch.distributed.checkpoint.state_dict_saver import save

                writer = HuggingFaceStorageWriter(str(group.broadcast_object(folder)), save_distributed=True)
                save(unshared(checkpoint.tensors), storage_writer=writer)
            else:
                write_tensors(folder / "state.safetensors", checkpoint.tensors)
            if not group.is_main:
                return
            write_json(folder / "state.json", asdict(checkpoint.state))
            write_json(folder / "digests.json", {path.name: _digest(path) for path in sorted(folder.iterdir())})
        for old in self._step_folders()[: -self.KEEP]:
            remove(old)

    def load(
        self, like: dict[str, Tensor], group: ProcessGroup = SINGLE_PROCESS
    ) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest intact checkpoint, if there is one. Return it and a message for each damaged one.

        All ranks must call. Tensors have the names and shapes of ``like``. Those of a sharded model have its devices
        and shards. Others are in the memory of the host, because a GPU that has room for a training may not have room
        for its tensors twice.
        """
        found, damaged = self._newest_intact(like, group.sharded) if group.is_main else (None, [])
        state, damaged = group.broadcast_object((found.state if found else None, damaged))
        if state is None:
            return None, damaged
        if group.sharded:
            return Checkpoint(_read_shards(self._step_folder(state.step), like), state), damaged
        empty = {name: torch.empty_like(value, device="cpu") for name, value in like.items()}
        tensors = found.tensors if found else empty
        group.broadcast_tensors(tensors[name] for name in like)
        return Checkpoint(tensors, state), damaged

    def count_others(self) -> int:
        """Return the number of other unfinished trainings with checkpoints in this workspace."""
        return sum(1 for path in self.folder.parent.glob("*/step-*/digests.json") if path.parent.parent != self.folder)

    def remove(self) -> None:
        """Remove the checkpoints of this training, once its result is exported."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for suffix in (".lock", ".pid"):
            self.folder.with_suffix(suffix).unlink(missing_ok=True)

    @staticmethod
    def folder_name(step: int) -> str:
        """Return the name of the folder for the checkpoint of a step."""
        return f"step-{step:06d}"

    def _step_folder(self, step: int) -> Path:
        return self.folder / self.folder_name(step)

    def _step_folders(self) -> list[Path]:
        folders = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def _newest_intact(self, like: dict[str, Tensor], sharded: bool) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest intact checkpoint. Tensors of a sharded model are not read yet."""
        damaged: list[str] = []
        for folder in reversed(self._step_folders()):
            try:
                check_digests(folder)
                state = read_state(folder)
                tensors = {} if sharded else _read_tensors(folder, like)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                damaged.append(f"{folder}: damaged, skipped: {error}")
            else:
                return Checkpoint(tensors, state), damaged
        return None, damaged


def check_digests(folder: Path) -> None:
    """Raise OSError or ValueError if a checkpoint does not have exactly the files and bytes that were written."""
    digests = read_json(folder / "digests.json")
    if not isinstance(digests, dict) or set(digests) != {path.name for path in folder.iterdir()} - {"digests.json"}:
        raise ValueError("its files are not those that digests.json lists")
    for name, digest in digests.items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ValueError(f"{name} does not match its digest")


def read_state(folder: Path) -> TrainState:
    """Read the state of a checkpoint. Raise OSError or ValueError if it does not describe a training."""
    content = read_json(folder / "state.json")
    try:
        TypeAdapter(TrainState).validate_json((folder / "state.json").read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"state.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if missing := {each.name for each in fields(TrainState)} - set(content):
        raise ValueError(f"state.json: {min(missing)} is missing")
    state = TrainState(**content)  # as it was written: pydantic would turn the integers of history into floats
    if folder.name != Checkpoints.folder_name(state.step):
        raise ValueError(f"state.json: it is of step {state.step}")
    if not any(
        row.keys() >= {"val_loss", "train_loss"} and row.get("step") == state.best_step for row in state.history
    ):
        raise ValueError(f"state.json: history has no losses of best_step = {state.best_step}")
    return state


def _read_tensors(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the full tensors of a checkpoint that ``like`` names."""
    path = folder / "state.safetensors"
    found = load_file(path) if path.exists() else _read_shards(folder, like, no_dist=True)
    tensors = {name: found[name] for name in like}
    for name, value in like.items():
        if (tensors[name].shape, tensors[name].dtype) != (value.shape, value.dtype):
            raise ValueError(f"{name} has another shape or number format than the model's")
    return tensors


def _read_shards(folder: Path, like: dict[str, Tensor], no_dist: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, sharded like those of ``like``. All ranks must call, unless ``no_dist``."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {name: torch.empty_like(value) for name, value in like.items()}
    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except CheckpointException as error:  # it has other tensors
        raise ValueError(str(error).splitlines()[0]) from error
    return tensors


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
