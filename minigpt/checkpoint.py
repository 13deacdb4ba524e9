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
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minigpt.drafts import Drafts
from minigpt.errors import UserError
from minigpt.files import replacing, write_json
from minigpt.model import GPT
from minigpt.params import Model as Config
from minigpt.params import Params
from minigpt.ranks import ALONE, Ranks
from minigpt.tokenizer import Tokenizer

TRAINING_CODE = ("corpus.py", "model.py", "optimizer.py", "ranks.py", "score.py", "tokenizer.py", "trainer.py")
"""The modules that decide what a training step does; a checkpoint is theirs alone."""


SPREAD = {"processes", "parallel", "activation_checkpointing"}
"""Params of training that say where it is computed, not what; a checkpoint of one value goes on with another."""


def fingerprint(params: Params, corpus_digest: str) -> str:
    """What makes two trainings the same: their params, data and code. 16 hexadecimal digits."""
    here = Path(__file__).parent
    code = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in TRAINING_CODE]
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

    def save(self, state: State, ranks: Ranks = ALONE) -> None:
        """Write a state; all but the last two are removed.

        Args:
            state: the same in all processes, or this one's part of it.
            ranks: all must call; only the first writes, unless the state is sharded.
        """
        if not ranks.first and not ranks.sharded:
            return
        target = self.folder / f"step-{state.facts['step']:06d}"
        with replacing(target) if ranks.first else nullcontext(target) as folder:
            if ranks.sharded:
                _write_parts(ranks.share(folder), state.tensors)
            else:
                _write_tensors(folder / "state.safetensors", state.tensors)
            if not ranks.first:
                return
            write_json(folder / "state.json", state.facts)
            write_json(folder / "digests.json", {path.name: _digest(path) for path in sorted(folder.iterdir())})
        for old in self._steps()[: -self.KEPT]:
            shutil.rmtree(old)

    def load(self, like: dict[str, Tensor], ranks: Ranks = ALONE) -> tuple[State | None, list[str]]:
        """The newest state that is whole, and a line on each that is not.

        Args:
            like: the tensors that a state has, by name: their shapes, devices and shards.
            ranks: all must call, and all get the state that the first has found.
        """
        found: tuple[Path, State] | None = None
        damaged: list[str] = []
        for folder in reversed(self._steps() if ranks.first else []):
            try:
                digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
                if set(digests) != {path.name for path in folder.iterdir()} - {"digests.json"}:
                    raise ValueError("its files are not those that were recorded")
                for name, digest in digests.items():
                    if _digest(folder / name) != digest:
                        raise ValueError(f"{name} does not have its recorded digest")
                facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                found = folder, State({} if ranks.sharded else _read_tensors(folder, like), facts)
                break
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damaged.append(f"{folder}: damaged, passed over: {error}")
        place, damaged = ranks.share((found and (found[0], found[1].facts), damaged))
        if place is None:
            return None, damaged
        if ranks.sharded:
            return State(_read_parts(place[0], like), place[1]), damaged
        tensors = found[1].tensors if found else {name: torch.empty_like(value) for name, value in like.items()}
        ranks.spread(tensors[name] for name in like)
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


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; two names of one tensor become two copies, which the format asks for."""
    seen: set[int] = set()
    plain = {}
    for name, value in tensors.items():
        here = value.detach().cpu().contiguous()
        plain[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    path.write_bytes(save(plain))


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


def export(
    folder: Path, config: Config, weights: dict[str, Tensor], tokenizer: Tokenizer, drafts: Drafts | None = None
) -> None:
    """Write a trained model: model.safetensors, config.json, tokenizer.json and drafts.safetensors in one folder."""
    with replacing(folder) as target:
        tied = {"head.weight"} if config.tied_head else set()
        _write_tensors(target / "model.safetensors", {name: weights[name] for name in weights if name not in tied})
        write_json(target / "config.json", {"vocab_size": tokenizer.vocab_size, "model": config.model_dump()})
        tokenizer.save(target / "tokenizer.json")
        if drafts:
            tables = {str(order): torch.from_numpy(table) for order, table in drafts.tables.items()}
            _write_tensors(target / "drafts.safetensors", tables)


def load_drafts(folder: Path) -> Drafts | None:
    """The drafts of an exported model; None if it was exported without.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "drafts.safetensors"
    try:
        return Drafts({int(order): table.numpy() for order, table in load_file(path).items()})
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged; without this file, all works slower: {error}") from None


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """Read an exported model, ready to be used (in evaluation mode).

    Raises:
        UserError: the folder or a file is missing, damaged, or of another shape than its config says.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model; `dvc repro train` makes it, `dvc pull` brings a stored one")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, vocab_size = Config.model_validate(described["model"]), described["vocab_size"]
    except FileNotFoundError:
        raise UserError(f"{folder / 'config.json'}: no such file") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{folder / 'config.json'}: not a model's description: {str(error).splitlines()[0]}") from None
    if vocab_size != tokenizer.vocab_size:
        raise UserError(f"{folder}: the model has {vocab_size} characters, its tokenizer {tokenizer.vocab_size}")
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short: {error}") from None
    model = GPT(config, vocab_size)
    if config.tied_head and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise UserError(
            f"{path}: {name} is {found.get(name, 'missing')}, config.json asks for {expected.get(name, 'none')}"
        )
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer
