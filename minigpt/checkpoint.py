"""What a training leaves on disk: the state that it resumes from, and the model that it exports.

Both hold tensors as safetensors and the rest as JSON: nothing is unpickled, so nothing is executed on loading.
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
from contextlib import contextmanager
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
from minigpt.tokenizer import Tokenizer

TRAINING_CODE = ("corpus.py", "model.py", "optimizer.py", "ranks.py", "score.py", "tokenizer.py", "trainer.py")
"""The modules that decide what a training step does; a checkpoint is theirs alone."""


def fingerprint(params: Params, corpus_digest: str) -> str:
    """What makes two trainings the same: their params, data and code. 16 hexadecimal digits."""
    here = Path(__file__).parent
    code = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in TRAINING_CODE]
    facts = [params.model.model_dump(), params.train.model_dump(), corpus_digest, code, torch.__version__]
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

    def save(self, state: State) -> None:
        """Write a state; all but the last two are removed."""
        with replacing(self.folder / f"step-{state.facts['step']:06d}") as folder:
            _write_tensors(folder / "state.safetensors", state.tensors)
            write_json(folder / "state.json", state.facts)
            write_json(folder / "digests.json", {path.name: _digest(path) for path in sorted(folder.iterdir())})
        for old in self._steps()[: -self.KEPT]:
            shutil.rmtree(old)

    def load(self, device: torch.device, shapes: dict[str, torch.Size]) -> tuple[State | None, list[str]]:
        """The newest state that is whole, and a line on each that is not.

        Args:
            device: where its tensors are put.
            shapes: of tensors that the state must have, by name.
        """
        damaged: list[str] = []
        for folder in reversed(self._steps()):
            try:
                digests = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
                for name in ("state.json", "state.safetensors"):
                    if _digest(folder / name) != digests[name]:
                        raise ValueError(f"{name} does not have its recorded digest")
                facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                tensors = load_file(folder / "state.safetensors", str(device))
                if wrong := [name for name, shape in shapes.items() if tensors[name].shape != shape]:
                    raise ValueError(f"{wrong[0]} has another shape than the model's")
                return State(tensors, facts), damaged
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damaged.append(f"{folder}: damaged, passed over: {error}")
        return None, damaged

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
