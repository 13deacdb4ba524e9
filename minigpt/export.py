"""Exported models: a folder with model.safetensors, config.json and tokenizer.json.

Nothing is unpickled, so loading a model executes no code.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.files import atomic_directory, require_file, require_json, write_json
from minigpt.model import GPT, weight_shapes
from minigpt.params import Count, ModelParams, Section, validate
from minigpt.runtime.distributed import to_local


class ModelDescription(Section):
    """Content of config.json."""

    vocab_size: Count
    model: ModelParams


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    path.write_bytes(save(unshared({name: value.detach().cpu().contiguous() for name, value in tensors.items()})))


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a copy of each that shares memory with one before it, as safetensors requires.

    A tied head shares that of the embedding. Of a sharded tensor, this process's shard counts.
    """
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        here = to_local(value)
        result[name] = value.clone() if here.numel() and here.data_ptr() in seen else value
        seen.add(here.data_ptr())
    return result


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
    try:
        found = folder.is_dir()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{folder}: not readable: {error.strerror}") from None
    if not found:
        raise UserError(f"{folder}: no such model; train one with `dvc repro train`, or fetch one with `dvc pull`")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    config = _read_config(folder / "config.json", tokenizer.vocab_size)
    path = folder / "model.safetensors"
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            _check_tensors(path, file, config, tokenizer.vocab_size)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{path}: {name} has values that are not finite; train again with `dvc repro --force train`"
            )
    if config.tied_head:
        weights["head.weight"] = weights["embedding.weight"]
    model = GPT(config, tokenizer.vocab_size)
    model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer


def _read_config(path: Path, vocab_size: int) -> ModelParams:
    described = require_json(path, "the description of a model")
    if not isinstance(described, dict):
        raise UserError(f"{path}: not the description of a model: expected the keys vocab_size and model")
    description = validate(ModelDescription, described, f"{path}: ")
    if description.vocab_size != vocab_size:
        raise UserError(f"{path}: the model has {description.vocab_size} characters, but its tokenizer {vocab_size}")
    return description.model


def _check_tensors(path: Path, file: Any, config: ModelParams, vocab_size: int) -> None:
    """Compare the header of a safetensors file with the shapes that the model requires. No tensor is read."""
    expected = weight_shapes(config, vocab_size)
    for name in sorted(expected.keys() | file.keys()):
        stored = file.get_slice(name) if name in file.keys() else None  # noqa: SIM118 - not a dict
        shape = tuple(stored.get_shape()) if stored else "missing"
        if shape != expected.get(name):
            wanted = expected.get(name, "no such tensor")
            raise UserError(f"{path}: the shape of {name} is {shape}, but config.json requires {wanted}")
        if stored and stored.get_dtype() != "F32":
            raise UserError(f"{path}: {name} has the type {stored.get_dtype()}, but weights must be F32")
