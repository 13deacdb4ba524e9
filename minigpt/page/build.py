"""The page as one file: page.html with the facts, the weights, the style and the scripts."""

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from minigpt.errors import UserError
from minigpt.files import write_atomically
from minigpt.model import GPT, Linear
from minigpt.page.html import FOLDER, fill
from minigpt.params import WeightFormat
from minigpt.quantize import WeightDtype, quantize_int8

ENGINE = ("gpt.js", "writer.js")
INTERFACE = (
    "tools.js",
    "sheet.js",
    "write.js",
    "panels.js",
    "inspect.js",
    "charts.js",
    "measure.js",
    "views.js",
    "app.js",
)
SCRIPTS = (*ENGINE, *INTERFACE)
MAX_BYTES = 50_000_000
"""Largest page: browsers read larger files slowly, and many mail servers reject them."""

DTYPES: dict[WeightDtype, float] = {"float32": 1e6, "bfloat16": 5e6, "int8": float("inf")}
"""Largest number of parameters for which a page has weights of each dtype, unless another one is chosen."""

Facts = dict[str, Any]


def choose_dtype(model: GPT, dtype: WeightFormat = "auto") -> WeightDtype:
    """Return the dtype of the weights in the page: ``auto`` is float32 for small models, int8 for large ones."""
    if dtype != "auto":
        return dtype
    return next(name for name, limit in DTYPES.items() if model.num_parameters() <= limit)


def pack(model: GPT, dtype: WeightDtype) -> tuple[Facts, bytes]:
    """Return the description of the tensors of a model for the facts, and their bytes, little-endian.

    Weights of linear maps have ``dtype``. Embeddings are bfloat16 at least, also if the head shares them: a row of
    them is read alone, so its rounding errors do not average out. All other tensors are small, and float32.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    tied = model.config.tied_head
    tensors, content = {}, bytearray()
    for name, value in model.state_dict().items():
        if tied and name == "head.weight":
            continue
        weight = value.detach().cpu().float()
        description: Facts = {"shape": list(weight.shape), "dtype": "float32", "offset": len(content)}
        if dtype == "int8" and name in linear:
            integers, scales = quantize_int8(weight)
            content += integers.numpy().tobytes()
            description |= {"dtype": "int8", "scales_offset": len(content)}
            content += _bytes(scales.float())
        elif dtype != "float32" and (name in linear or "embedding" in name or "position" in name):
            content += _bytes(weight.bfloat16().view(torch.int16))
            description["dtype"] = "bfloat16"
        else:
            content += _bytes(weight)
        tensors[name] = description
    packed = bytes(content)
    return {"dtype": dtype, "tensors": tensors, "bytes": len(packed), "adler32": zlib.adler32(packed)}, packed


def _bytes(tensor: Tensor) -> bytes:
    array = tensor.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def render(facts: Facts, weights: Sequence[bytes]) -> bytes:
    """Return the page for the facts and the weights of each of its models, as UTF-8."""
    elements = "\n".join(
        f'<script type="text/plain" id="{model["weights"]}">{base64.b64encode(packed).decode()}</script>'
        for model, packed in zip(facts["models"], weights, strict=True)
    )
    title = "minigpt: " + " and ".join(model["name"] for model in facts["models"])
    return fill(FOLDER / "page.html", title, facts, [FOLDER / name for name in SCRIPTS], data=elements)


def write_page(output: Path, facts: Facts, weights: Sequence[bytes]) -> int:
    """Write the page to ``output``, complete or not at all, and return its size in bytes.

    Raises:
        UserError: the page would be larger than MAX_BYTES, or ``output`` is a folder.
    """
    page = render(facts, weights)
    if len(page) > MAX_BYTES:
        largest = max(facts["models"], key=lambda model: model["bytes"])
        narrower = list(get_args(WeightDtype))[list(get_args(WeightDtype)).index(largest["dtype"]) + 1 :]
        fix = f"use --dtype {narrower[-1]}" if narrower else "use a smaller model"
        raise UserError(
            f"the page would have {len(page) / 1e6:.1f} MB with {largest['dtype']} weights, "
            f"more than {MAX_BYTES / 1e6:.0f} MB; {fix}"
        )
    if output.is_dir():
        raise UserError(f"{output} is a folder; expected a file, such as {output / 'page.html'}")
    write_atomically(output, page)
    return len(page)
