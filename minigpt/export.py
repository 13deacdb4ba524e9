"""TODO."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.files import atomic_directory, write_json
from minigpt.generation.drafts import Drafts
from minigpt.model import GPT
from minigpt.params import ModelParams as Config


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; two names of one tensor become two copies, which the format asks for."""
    seen: set[int] = set()
    plain = {}
    for name, value in tensors.items():
        here = value.detach().cpu().contiguous()
        plain[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    path.write_bytes(save(plain))


def export(
    folder: Path, config: Config, weights: dict[str, Tensor], tokenizer: Tokenizer, drafts: Drafts | None = None
) -> None:
    """Write a trained model: model.safetensors, config.json, tokenizer.json and drafts.safetensors in one folder."""
    with atomic_directory(folder) as target:
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
