"""Exported models: a folder with model.safetensors, config.json and tokenizer.json.

Nothing is unpickled, so loading a model executes no code.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.files import atomic_directory, write_json
from minigpt.model import GPT
from minigpt.params import ModelParams


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors. Tensors that share memory are written twice, as the format requires."""
    seen: set[int] = set()
    plain = {}
    for name, value in tensors.items():
        here = value.detach().cpu().contiguous()
        plain[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    path.write_bytes(save(plain))


def export(folder: Path, config: ModelParams, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a trained model to ``folder``, which appears complete or not at all."""
    with atomic_directory(folder) as target:
        tied = {"head.weight"} if config.tied_head else set()
        write_tensors(target / "model.safetensors", {name: weights[name] for name in weights if name not in tied})
        write_json(target / "config.json", {"vocab_size": tokenizer.vocab_size, "model": config.model_dump()})
        tokenizer.save(target / "tokenizer.json")


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer]:
    """Read an exported model, in evaluation mode.

    Raises:
        UserError: the folder or a file is missing, damaged, or does not match the others.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model; train one with `dvc repro train`, or fetch one with `dvc pull`")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    config, vocab_size = _read_config(folder / "config.json")
    if vocab_size != tokenizer.vocab_size:
        raise UserError(f"{folder}: the model has {vocab_size} characters, but its tokenizer {tokenizer.vocab_size}")
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    model = GPT(config, vocab_size)
    if config.tied_head and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise UserError(
            f"{path}: the shape of {name} is {found.get(name, 'missing')}, "
            f"but config.json requires {expected.get(name, 'no such tensor')}"
        )
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer


def _read_config(path: Path) -> tuple[ModelParams, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return ModelParams.model_validate(described["model"]), described["vocab_size"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: not the description of a model: {str(error).splitlines()[0]}") from None
