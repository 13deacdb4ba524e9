"""The exported model as a folder in MLflow's model format, written without MLflow, whose import takes seconds."""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from minigpt.files import require_json
from minigpt.params import SamplingParams

REQUIREMENTS = ["torch", "numpy", "pydantic", "safetensors", "tqdm", "filelock", "psutil"]
"""Packages that serving needs besides mlflow."""

EXAMPLE = "input_example.json"


def package(model: Path, target: Path) -> Path:
    """Write the exported model ``model`` as an MLflow model to ``target``, with its code, and return ``target``.

    The files are those of ``mlflow.pyfunc.save_model`` with serving.py as ``python_model``; a test compares them.
    """
    serving, library = Path(__file__).with_name("serving.py"), Path(__file__).parents[1]
    python = platform.python_version()
    shutil.copytree(model, target / "artifacts" / model.name)
    shutil.copy(serving, target)
    _write_example(target, require_json(model / "tokenizer.json", "a vocabulary")["characters"][0])
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.copytree(library, target / "code" / library.name, ignore=shutil.ignore_patterns("__pycache__"))

    requirements = [f"mlflow=={version('mlflow')}", *REQUIREMENTS]
    (target / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    conda = [f"python={python}", f"pip<={pip}" if (pip := _version("pip")) else "pip", {"pip": requirements}]
    _write_yaml(target / "conda.yaml", {"channels": ["conda-forge"], "dependencies": conda, "name": "mlflow-env"})
    build = [f"{name}=={found}" if (found := _version(name)) else name for name in ("pip", "setuptools", "wheel")]
    environment = {"python": python, "build_dependencies": build, "dependencies": ["-r requirements.txt"]}
    _write_yaml(target / "python_env.yaml", environment)
    flavor = {
        "artifacts": {"model": {"path": f"artifacts/{model.name}", "uri": str(model)}},
        "cloudpickle_version": version("cloudpickle"),
        "code": "code",
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.pyfunc.loaders.code_model",
        "model_code_path": str(serving),
        "python_version": python,
        "streamable": False,
    }
    described = {
        "flavors": {"python_function": flavor},
        "is_signature_from_type_hint": False,
        "mlflow_version": version("mlflow"),
        "model_id": None,
        "model_size_bytes": size,
        "model_uuid": uuid.uuid4().hex,
        "prompts": None,
        "saved_input_example_info": {
            "artifact_path": EXAMPLE,
            "pandas_orient": "split",
            "serving_input_path": f"serving_{EXAMPLE}",
            "type": "dataframe",
        },
        "signature": signature(),
        "type_hint_from_example": False,
        "utc_time_created": str(datetime.now(timezone.utc).replace(tzinfo=None)),
    }
    _write_yaml(target / "MLmodel", described)
    return target


def signature() -> dict[str, str]:
    """Return MLflow's signature: a column of prompts in, texts out, and the names and defaults of SamplingParams."""
    kinds = {int: "long", float: "double", str: "string", list: "string"}
    params = [
        {"name": name, "default": value, "shape": [-1] if isinstance(value, list) else None, "type": kinds[type(value)]}
        for name, value in SamplingParams().model_dump().items()
    ]
    prompts = [{"type": "string", "name": "prompt", "required": True}]
    parts = {"inputs": prompts, "outputs": [{"type": "string", "required": True}], "params": params}
    return {name: json.dumps(part) for name, part in parts.items()}


def _write_example(target: Path, prompt: str) -> None:
    """Write a prompt as the example that MLflow's pages show, and as the body of a request."""
    rows = {"columns": ["prompt"], "data": [[prompt]]}
    (target / EXAMPLE).write_text(json.dumps(rows), encoding="utf-8")
    (target / f"serving_{EXAMPLE}").write_text(json.dumps({"dataframe_split": rows}, indent=2), encoding="utf-8")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
