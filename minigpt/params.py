"""Typed params of ``params.yaml``, with strict validation that reports all mistakes together by their dotted names."""

import difflib
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from minigpt.choices import ACTIVATIONS, SCHEDULES
from minigpt.errors import UserError
from minigpt.files import open_file

LOWEST_TEMPERATURE = 1e-6


def _check_temperature(temperature: float) -> float:
    """Reject temperatures so small that logits divided by them may be infinite."""
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"must be 0, or at least {LOWEST_TEMPERATURE}, got {temperature}")
    return temperature


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"expected a path, which has no NUL character, got {path!r:.80}")
    return path


# The upper limits are far above any use. Below them, sizes fit in 64 bits and products of numbers in a float32.
Count = Annotated[int, Field(ge=1, le=10**12)]
CountOrZero = Annotated[int, Field(ge=0, le=10**12)]
Batch = Annotated[int, Field(ge=1, le=10**6)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Temperature = Annotated[NotNegative, AfterValidator(_check_temperature)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Taps = Annotated[int, Field(ge=1, le=16)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,4})?)$")]
Compile = Literal["auto", "always", "never"]
WeightFormat = Literal["auto", "float32", "bfloat16", "int8"]
SplitKind = Literal["end", "each_file"]
Overflow = Literal["reread", "slide", "roll"]

# Keys, and values by key, of earlier versions with their present names.
RENAMED = {"train.final_lr": "train.final_lr_fraction", "train.token_dropout": "train.token_noise"}
RENAMED_VALUES = {("overflow", "hop"): "reread"}


class Section(BaseModel):
    """Section of ``params.yaml``: immutable, with exact types, without unknown keys or infinite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class DataParams(Section):
    """The text and its split; the stage prepare depends on them."""

    source: Text
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Fraction
    split: SplitKind
    normalize: Literal["none", "NFC"]

    @field_validator("test_fraction")
    @classmethod
    def _check_training_split(cls, test_fraction: float, info: ValidationInfo) -> float:
        if (val_fraction := info.data.get("val_fraction", 0)) + test_fraction >= 1:
            raise ValueError(
                "data.val_fraction + data.test_fraction must be less than 1, or no training split is left, "
                f"got {val_fraction} + {test_fraction}"
            )
        return test_fraction


class ModelParams(Section):
    """The architecture; the stage train depends on it."""

    n_layer: Annotated[int, Field(ge=1, le=1000)]
    n_head: Annotated[int, Field(ge=1, le=1000)]
    head_size: Annotated[int, Field(ge=1, le=10_000)]
    n_embd: Annotated[int, Field(ge=1, le=100_000)]
    block_size: Annotated[int, Field(ge=2, le=100_000)]
    attention_window: Annotated[int, Field(ge=0, le=100_000)]
    positions: Literal["learned", "rotary"]
    rotary_base: Annotated[float, Field(ge=1, le=1e9)]
    activation: Literal[tuple(ACTIVATIONS)]  # type: ignore[valid-type]
    mlp_ratio: Annotated[float, Field(gt=0, le=100)]
    norm_affine: bool
    embd_norm: bool
    qk_norm: bool
    embd_conv: Taps
    mlp_conv: Taps = 1  # older models have none
    bias: bool
    tied_head: bool
    init: Literal["zero", "normal"]
    dropout: Fraction
    dropout_kind: Literal["element", "channel"]

    @property
    def window(self) -> int:
        """Characters that a position attends to in each block, itself included."""
        return min(self.attention_window or self.block_size, self.block_size)

    @field_validator("positions")
    @classmethod
    def _check_rotary_head_size(cls, positions: str, info: ValidationInfo) -> str:
        if positions == "rotary" and (head_size := info.data.get("head_size", 0)) % 2:
            raise ValueError(f"rotary positions rotate pairs of channels, so head_size must be even, got {head_size}")
        return positions


class TrainParams(Section):
    """The training; the stage train depends on it."""

    seed: Seed
    init_from: Annotated[str, AfterValidator(_check_path)]
    device: Device
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    compile: Compile
    deterministic: bool
    max_iters: CountOrZero
    batch_size: Batch
    grad_accum: Batch
    processes: Annotated[int, Field(ge=1, le=1000)]
    parallel: Literal["ddp", "fsdp"]
    activation_checkpointing: bool
    optimizer: Literal["adamw", "muon"]
    learning_rate: NotNegative
    adam_learning_rate: NotNegative
    momentum: Fraction
    row_norm: bool
    beta1: Fraction
    beta2: Fraction
    epsilon: Annotated[float, Field(ge=1e-30, le=1)]
    weight_decay: NotNegative
    schedule: Literal[tuple(SCHEDULES)]  # type: ignore[valid-type]
    warmup_iters: CountOrZero
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)]
    grad_clip: NotNegative
    token_noise: Fraction
    temperature: Annotated[float, Field(ge=0.1, le=10)]
    eval_interval: Count
    eval_chars: Count
    patience: CountOrZero
    sample_interval: CountOrZero
    sample_chars: CountOrZero

    @field_validator("grad_accum", "processes")
    @classmethod
    def _check_equal_parts(cls, parts: int, info: ValidationInfo) -> int:
        name = "batch_size" if info.field_name == "grad_accum" else "grad_accum"
        whole = info.data.get(name, parts)
        if whole % parts:
            hint = "" if name == "batch_size" else f", so set train.grad_accum to {parts} as well"
            raise ValueError(f"must divide {name} into equal parts; {whole} is not a multiple of {parts}{hint}")
        return parts


class EvaluateParams(Section):
    """The evaluation; the stage evaluate depends on it."""

    stride: CountOrZero
    train_chars: Count


class SamplingParams(Section):
    """Sampling parameters, the same in ``params.yaml``, on the command line and in requests to a server.

    ``params.yaml`` must give all of them. The defaults apply to the command line and to requests.
    """

    max_new_tokens: CountOrZero = Field(default=500, description="characters to write after the prompt, at most")
    temperature: Temperature = Field(default=0.8, description="divides the logits; 0: always the most likely character")
    top_k: CountOrZero = Field(default=0, description="keep only the k most likely characters; 0: keep all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="keep the most likely characters that together reach this probability; 1: keep all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="keep characters at least this fraction as likely as the most likely one; 0: keep all"
    )
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] = Field(
        default=1.0, description="above 1, characters in the context become less likely; 1: off"
    )
    stop: Annotated[list[StopString], Field(max_length=100)] = Field(
        default=[], description="end the text before this string"
    )
    seed: Seed = Field(default=1337, description="the same seed and settings write the same text")
    overflow: Overflow = Field(default="reread", description="what to do when the context is full")


class SampleParams(SamplingParams):
    """The generated samples; the stage sample depends on them."""

    prompts: Annotated[list[Text], Field(min_length=1)]
    num_samples: Annotated[int, Field(ge=1, le=10_000)]
    dtype: WeightFormat = Field(default="auto", description="format of the weights")
    compile: Compile = Field(default="auto", description="whether to use a decoder compiled with g++, on a CPU")


class Params(Section):
    """All of ``params.yaml``."""

    data: DataParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    sample: SampleParams

    @field_validator("evaluate")
    @classmethod
    def _check_stride(cls, evaluate: EvaluateParams, info: ValidationInfo) -> EvaluateParams:
        if (model := info.data.get("model")) and evaluate.stride > model.block_size:
            raise ValueError(f"its stride must be at most model.block_size = {model.block_size}, got {evaluate.stride}")
        return evaluate

    @field_validator("sample")
    @classmethod
    def _check_overflow(cls, sample: SampleParams, info: ValidationInfo) -> SampleParams:
        if (model := info.data.get("model")) and sample.overflow == "roll" and model.positions == "learned":
            raise ValueError("its overflow: roll needs model.positions: rotary; with learned ones, use reread or slide")
        return sample


MAX_BYTES = 1 << 16
"""Largest params file in bytes. The YAML reader may take 2 s for this size."""

MAX_MISTAKES = 50
"""Mistakes that are explained. Finding the closest name of many unknown keys would take minutes."""

MAX_NODES = 100_000
"""Most values that a params file may have after its aliases are expanded."""


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a params file; raise one UserError that lists all mistakes."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a params file or a profile; raise a UserError if it cannot be read or is too large."""
    try:
        with open_file(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes; is this a params file?")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the root of the repository, where params.yaml is") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: not readable: {reason}") from None


def parse(text: str, source: str) -> Params:
    """Validate the text of a params file as :func:`load` does. Messages call the file ``source``."""
    tree = read_yaml(text, source)
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected the sections {', '.join(Params.model_fields)}, got {_shown(tree)}")
    # Fields with a default must be in the file too, because DVC compares only the values in the file.
    missing = [
        f"{name}.{key}"
        for name, section in Params.model_fields.items()
        for key in getattr(section.annotation, "model_fields", ())
        if isinstance(values := tree.get(name), dict) and key not in values
    ]
    return validate(Params, tree, f"{source}: ", missing=missing)


def read_yaml(text: str, source: str) -> Any:
    """Return the values of a YAML text as DVC reads them: YAML 1.2, by the same reader, without repeated keys.

    Raises:
        UserError: the text is not YAML, or it is a "YAML bomb": nested aliases that stand for very many values.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError

    try:
        # A mapping that is constructed already merges the mappings of its aliases, so the bomb is looked for before.
        if "&" in text and _count_nodes(YAML(typ="safe").compose(text), {}) > MAX_NODES:
            raise UserError(f"{source}: its aliases stand for more than {MAX_NODES:,} values; write the values instead")
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = " ".join((error.problem or error.context or "").split())
        if isinstance(error, DuplicateKeyError):
            problem, _, _ = problem.partition(" with value")
        raise UserError(f"{source}: not readable as YAML: {where}{_shorten(problem, 200)}") from None
    except UserError:
        raise
    except Exception as error:  # for wrong values with a tag, the reader also raises KeyError, IndexError and others
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{source}: not readable as YAML: {_shorten(problem, 200)}") from None


def _count_nodes(node: Any, counts: dict[int, float]) -> float:
    """Return the number of nodes of a YAML graph as a tree, given those of known nodes; infinite for a cycle."""
    if id(node) not in counts:
        counts[id(node)] = float("inf")  # until it is known: a node that contains itself has no end
        parts = node.value if isinstance(getattr(node, "value", None), list) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]


def validate(
    model: type[SectionT], values: dict[str, Any], prefix: str = "", *, rename: Callable[[str], str] = str,
    missing: Iterable[str] = (),
) -> SectionT:  # fmt: skip
    """Return ``values`` as an instance of ``model``; raise one UserError that lists all mistakes.

    The message starts with ``prefix``, and names each dotted key by ``rename``. It reports the dotted keys ``missing``
    in addition to missing fields without a default.
    """
    mistakes = dict.fromkeys(missing, "missing")
    try:
        validated = model.model_validate(values)
    except ValidationError as invalid:
        for error in invalid.errors()[:MAX_MISTAKES]:
            mistakes[".".join(_shorten(str(part), 80) for part in error["loc"]) or "key"] = _explain(model, error)
    else:
        if not mistakes:
            return validated
    for old, new in RENAMED.items():
        if old in mistakes:
            mistakes.pop(new, None)
    lines = [
        f"{rename(name)} was renamed {RENAMED[name]}" if name in RENAMED else f"{rename(name)}: {mistake}"
        for name, mistake in mistakes.items()
    ]
    raise UserError(prefix + (lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} mistakes", *lines])))


def flatten(section: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name, as DVC and MLflow show them: ``{'model.n_embd': 384, ...}``."""
    tree = section.model_dump() if isinstance(section, BaseModel) else section
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


_EXPECTED = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "a text", "list_type": "a list",
    "model_type": "a section of keys and values", "string_pattern_mismatch": "'auto', 'cpu', 'cuda' or 'cuda:0'",
}  # fmt: skip
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _explain(model: type[Section], error: Any) -> str:
    """Return one of pydantic's errors as a short message, such as ``expected an integer, got 'abc'``."""
    kind, context, value, location = error["type"], error.get("ctx", {}), error["input"], error["loc"]
    if kind == "missing":
        return "missing"
    if kind == "extra_forbidden":
        section: Any = model
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        closest = difflib.get_close_matches(str(location[-1]), list(section.model_fields), n=1, cutoff=0.5)
        return "unknown key" + (f"; did you mean {closest[0]}?" if closest else "")
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and isinstance(value, str) and (location[-1], value) in RENAMED_VALUES:
        return f"{value} was renamed {RENAMED_VALUES[location[-1], value]}"
    if kind in _EXPECTED or kind == "literal_error":
        return f"expected {_EXPECTED.get(kind) or context['expected']}, got {_shown(value)}"
    for limit, words in _LIMITS.items():
        if limit in context:
            return f"must be {words} {str(context[limit]).removesuffix('.0')}, got {_shown(value)}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind in ("string_too_long", "too_long"):
        return f"must have at most {context['max_length']} {'characters' if kind[0] == 's' else 'entries'}"
    return f"{error['msg']}, got {_shown(value)}"


_REPR = reprlib.Repr()  # repr itself writes every part of a nested value before it can be shortened
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def _shown(value: Any) -> str:
    return _shorten(_REPR.repr(value), 80)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())
