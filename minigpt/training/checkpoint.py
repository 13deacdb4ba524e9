"""What a training leaves on disk: the state that it resumes from, and the model that it exports.

Both hold tensors as safetensors and the rest as JSON: nothing is unpickled, so nothing is executed on loading. A
sharded model's state is written and read with torch's distributed checkpoint, a file for each process, so that its
processes must share a disk. Any number of processes, sharded or not, goes on from what any other has saved.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigpt.errors import UserError
from minigpt.files import atomic_directory, write_json
from minigpt.params import Params
from minigpt.runtime.distributed import SINGLE_PROCESS, ProcessGroup

TRAINING_CODE = (
    "training", "evaluation/loss.py", "data", "runtime", "export.py", "model.py", "ops.py", "params.py", "errors.py",
    "files.py",
)  # fmt: skip
"""Files and folders of the library that decide the result of a training: the dependencies of the stage train."""

SPREAD = {"processes", "parallel", "activation_checkpointing"}
"""Params of training that say where it is computed, not what; a checkpoint of one value goes on with another."""


def fingerprint(params: Params, corpus_digest: str) -> str:
    """What makes two trainings the same: their params, data and code. 16 hexadecimal digits."""
    package = Path(__file__).parents[1]
    files = [file for name in TRAINING_CODE for file in (sorted((package / name).rglob("*.py")) or [package / name])]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    train = params.train.model_dump(exclude=SPREAD)
    facts = [params.model.model_dump(), train, corpus_digest, code, torch.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass
class State:
    """A training at the end of a step.

    Attributes:
        tensors: weights, best weights and optimizer state, by name.
        facts: everything else, as JSON holds it; ``step`` is the number of steps done.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The last states of one training, in ``<root>/.checkpoints/<fingerprint>/step-NNNNNN/``.

    Args:
        root: the main workspace, which outlives the copies that DVC runs experiments in.
        fingerprint: of the training.
    """

    KEPT = 2

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.folder = root / ".checkpoints" / fingerprint

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this training while it runs; the system frees the lock of a dead one.

        Raises:
            UserError: another process trains this; its id is named.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise UserError(
                    f"process {holder} is training exactly this already; wait for it, or end it with `kill {holder}`"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def run_key(self) -> str:
        """A name for this training, the same from its first start until it completes; 32 hexadecimal digits."""
        path = self.folder / "run.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".new")
            write_json(temporary, {"run": uuid.uuid4().hex})
            temporary.replace(path)
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])

    def save(self, state: State, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Write a state; all but the last two are removed.

        Args:
            state: the same in all processes, or this one's part of it.
            group: all must call; only the first writes, unless the state is sharded.
        """
        if not group.is_main and not group.sharded:
            return
        target = self.folder / f"step-{state.facts['step']:06d}"
        with atomic_directory(target) if group.is_main else nullcontext(target) as folder:
            if group.sharded:
                _write_parts(group.broadcast_object(folder), state.tensors)
            else:
                write_tensors(folder / "state.safetensors", state.tensors)
            if not group.is_main:
                return
            write_json(folder / "state.json", state.facts)
            write_json(folder / "digests.json", {path.name: _digest(path) for path in sorted(folder.iterdir())})
        for old in self._steps()[: -self.KEPT]:
            shutil.rmtree(old)

    def load(self, like: dict[str, Tensor], group: ProcessGroup = SINGLE_PROCESS) -> tuple[State | None, list[str]]:
        """The newest state that is whole, and a line on each that is not.

        Args:
            like: the tensors that a state has, by name: their shapes, devices and shards.
            group: all must call, and all get the state that the first has found.
        """
        found: tuple[Path, State] | None = None
        damaged: list[str] = []
        for folder in reversed(self._steps() if group.is_main else []):
            try:
                digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
                if set(digests) != {path.name for path in folder.iterdir()} - {"digests.json"}:
                    raise ValueError("its files are not those that were recorded")
                for name, digest in digests.items():
                    if _digest(folder / name) != digest:
                        raise ValueError(f"{name} does not have its recorded digest")
                facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                found = folder, State({} if group.sharded else _read_tensors(folder, like), facts)
                break
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damaged.append(f"{folder}: damaged, passed over: {error}")
        place, damaged = group.broadcast_object((found and (found[0], found[1].facts), damaged))
        if place is None:
            return None, damaged
        if group.sharded:
            return State(_read_parts(place[0], like), place[1]), damaged
        tensors = found[1].tensors if found else {name: torch.empty_like(value) for name, value in like.items()}
        group.broadcast_tensors(tensors[name] for name in like)
        return State(tensors, place[1]), damaged

    def others(self) -> int:
        """How many other unfinished trainings have states here."""
        return sum(1 for path in self.folder.parent.glob("*/step-*/digests.json") if path.parent.parent != self.folder)

    def remove(self) -> None:
        """Forget this training, once its outcome is exported."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".lock").unlink(missing_ok=True)

    def _steps(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{6,}", path.name))


def _read_tensors(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state, whole, on the devices of ``like``."""
    if (folder / "state.safetensors").exists():
        read = load_file(folder / "state.safetensors")
        tensors = {name: read[name].to(value.device) for name, value in like.items()}
    else:
        tensors = _read_parts(folder, like, alone=True)
    if wrong := [name for name, value in like.items() if tensors[name].shape != value.shape]:
        raise ValueError(f"{wrong[0]} has another shape than the model's")
    return tensors


def _write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what this process holds of the tensors; all processes must."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    save_parts(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _read_parts(folder: Path, like: dict[str, Tensor], alone: bool = False) -> dict[str, Tensor]:
    """The tensors of a state, of sharded ones this process's part; all processes must, unless one is ``alone``.

    Raises:
        ValueError: the state is not of tensors like these.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    tensors = {name: torch.empty_like(value) for name, value in like.items()}
    try:
        load_parts(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return tensors


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
