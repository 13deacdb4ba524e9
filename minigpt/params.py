"""The typed tree of ``params.yaml``: strict, and every mistake reported at once with its dotted name.

``python -m minigpt.params`` checks the file in this folder, or those named as arguments, and prints nothing
when all is well.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from minigpt.choices import ACTIVATIONS, SCHEDULES
from minigpt.errors import UserError, run

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class OneOf:
    """Validator of a name against the keys of a table in :mod:`minigpt.choices`."""

    def __init__(self, table: Mapping[str, object]) -> None:
        self.table = table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept exactly the names of the table."""
        return core_schema.literal_schema(list(self.table))


class Section(BaseModel):
    """A section of ``params.yaml``: exact types, no unknown keys, no infinities, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataParams(Section):
    """What is read, and how it is split; owned by the stage prepare."""

    source: Annotated[str, Field(min_length=1)]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    normalize: Literal["none", "NFC"]


class ModelParams(Section):
    """The architecture; owned by the stage train."""

    n_layer: Count
    n_head: Count
    head_size: Count
    n_embd: Count
    block_size: Annotated[int, Field(ge=2)]
    attention_window: CountOrZero
    positions: Literal["learned", "rotary"]
    rotary_base: Positive
    activation: Annotated[str, OneOf(ACTIVATIONS)]
    mlp_ratio: Positive
    norm_affine: bool
    embd_norm: bool
    qk_norm: bool
    embd_conv: Annotated[int, Field(ge=1, le=16)]
    bias: bool
    tied_head: bool
    init: Literal["zero", "normal"]
    dropout: Share
    dropout_kind: Literal["element", "channel"]

    @field_validator("positions")
    @classmethod
    def _rotary_needs_pairs(cls, positions: str, info: ValidationInfo) -> str:
        head_size = info.data.get("head_size", 0)
        if positions == "rotary" and head_size % 2:
            raise ValueError(f"rotary positions turn pairs of channels, so head_size must be even, got {head_size}")
        return positions


class TrainParams(Section):
    """The training; owned by the stage train."""

    seed: Seed
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    dtype: Literal["auto", "float32", "bfloat16"]
    compile: Literal["auto", "always", "never"]
    deterministic: bool
    max_iters: CountOrZero
    batch_size: Count
    grad_accum: Count
    processes: Count
    parallel: Literal["ddp", "fsdp"]
    activation_checkpointing: bool
    optimizer: Literal["adamw", "muon"]
    learning_rate: NotNegative
    adam_learning_rate: NotNegative
    momentum: Share
    beta1: Share
    beta2: Share
    epsilon: Positive
    weight_decay: NotNegative
    schedule: Annotated[str, OneOf(SCHEDULES)]
    warmup_iters: CountOrZero
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)]
    grad_clip: NotNegative
    token_noise: Share
    eval_interval: Count
    eval_chars: Count
    patience: CountOrZero

    @field_validator("grad_accum")
    @classmethod
    def _equal_parts(cls, grad_accum: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", grad_accum)
        if batch_size % grad_accum:
            raise ValueError(f"must divide batch_size into equal parts: {batch_size} is no multiple of {grad_accum}")
        return grad_accum

    @field_validator("processes")
    @classmethod
    def _shared_equally(cls, processes: int, info: ValidationInfo) -> int:
        grad_accum = info.data.get("grad_accum", processes)
        if grad_accum % processes:
            raise ValueError(
                f"{processes} processes share a step's train.grad_accum parts equally, and {grad_accum} is no multiple "
                f"of {processes}: set train.grad_accum to {processes} as well"
            )
        return processes


class EvaluateParams(Section):
    """How the trained model is scored; owned by the stage evaluate."""

    stride: CountOrZero
    train_chars: Count


class SamplingParams(Section):
    """How new characters are chosen: the same in ``params.yaml``, on the command line and in requests to a server."""

    max_new_tokens: CountOrZero = Field(default=500, description="characters to write after the prompt, at most")
    temperature: NotNegative = Field(default=0.8, description="divides the logits; 0: always the most likely character")
    top_k: CountOrZero = Field(default=0, description="keep only the k most likely characters; 0: keep all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="keep the most likely characters that together reach this probability; 1: keep all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="keep characters at least this fraction as likely as the most likely one; 0: keep all"
    )
    repetition_penalty: Positive = Field(
        default=1.0, description="divides the logits of characters in the context; 1: off"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], description="end the text before this string")
    seed: Seed = Field(default=1337, description="the same seed and settings write the same text")
    overflow: Literal["reread", "slide", "roll"] = Field(
        default="reread", description="what to do when the context is full"
    )


class SampleParams(SamplingParams):
    """What the trained model writes; owned by the stage sample."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    num_samples: Count
    dtype: Literal["auto", "float32", "bfloat16", "int8"]
    compile: Literal["auto", "always", "never"]


class Params(Section):
    """All of ``params.yaml``."""

    data: DataParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    sample: SampleParams

    @field_validator("evaluate")
    @classmethod
    def _no_gap_between_windows(cls, evaluate: EvaluateParams, info: ValidationInfo) -> EvaluateParams:
        model = info.data.get("model")
        if model and evaluate.stride > model.block_size:
            raise ValueError(f"its stride must be at most model.block_size = {model.block_size}, got {evaluate.stride}")
        return evaluate

    @field_validator("sample")
    @classmethod
    def _rolling_needs_distances(cls, sample: SampleParams, info: ValidationInfo) -> SampleParams:
        model = info.data.get("model")
        if model and sample.overflow == "roll" and model.positions == "learned":
            raise ValueError("its overflow: roll needs model.positions: rotary; with learned ones, take hop or slide")
        return sample


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (``3e-4`` is a number), as DVC reads them; PyYAML alone would give the text '3e-4'."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        UserError: the file is missing or is no YAML mapping, or any of its values is wrong; all are named.
    """
    try:
        tree = yaml.load(path.read_bytes().decode("utf-8-sig"), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's root, where params.yaml lies") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected the sections {', '.join(Params.model_fields)}, got {_shown(tree)}")
    try:
        return Params.model_validate(tree)
    except ValidationError as invalid:
        lines = [_explain(error) for error in invalid.errors()]
    raise UserError(f"{path}: " + (lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} mistakes", *lines])))


def flatten(section: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values, as DVC and MLflow show them: ``{'model.n_embd': 384, ...}``."""
    tree = section.model_dump() if isinstance(section, BaseModel) else section
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "model_type": "a section of keys and values",
}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _explain(error: Any) -> str:
    """One of pydantic's errors as ``model.n_embd: expected an integer, got 'abc'``."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    location = list(error["loc"])
    name = ".".join(map(str, location))
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(location[:-1]), n=1, cutoff=0.5)
        return f"{name}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return f"{name}: missing"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    if kind == "literal_error":
        return f"{name}: expected {context['expected']}, got {_shown(value)}"
    if kind in _EXPECTED:
        return f"{name}: expected {_EXPECTED[kind]}, got {_shown(value)}"
    for limit, words in _LIMITS.items():
        if limit in context:
            return f"{name}: must be {words} {context[limit]}, got {_shown(value)}"
    if kind == "string_pattern_mismatch":
        return f"{name}: expected 'auto', 'cpu', 'cuda' or 'cuda:0', got {_shown(value)}"
    if kind in ("string_too_short", "too_short"):
        return f"{name}: must not be empty"
    return f"{name}: {error['msg']}, got {_shown(value)}"


def _keys(location: list[Any]) -> list[str]:
    section: Any = Params
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _main() -> None:
    for path in sys.argv[1:] or ["params.yaml"]:
        load(Path(path))


if __name__ == "__main__":
    run(_main)
