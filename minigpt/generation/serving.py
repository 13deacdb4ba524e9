"""The exported model as an MLflow pyfunc: a table of prompts in, a list of texts out."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import pandas as pd  # not for its type alone: MLflow reads the hint of `predict`
from mlflow.models import set_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from minigpt.errors import UserError

if TYPE_CHECKING:
    from minigpt.generation.generator import Generator

REQUIREMENTS = ["torch", "numpy", "pydantic", "pyyaml", "safetensors", "tqdm"]
"""What serving needs beside mlflow."""

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 200,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "seed": 0,
}
"""The parameters of a request, with the values of those left out."""


class Writer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Continues prompts with the model that was packaged."""

    generator: Generator

    def load_context(self, context: Any) -> None:
        """Read the exported model, an artifact of the package."""
        from minigpt.generation.generator import Generator
        from minigpt.runtime.device import choose_device

        self.generator = Generator.load(Path(context.artifacts["model"]), choose_device("auto"), compiled="kept")
        self.turn = threading.Lock()

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow passes it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """Continue each prompt of the column ``prompt``.

        Raises:
            MlflowException: a prompt has a character that the model does not know, or a parameter is out of range.
        """
        from mlflow.exceptions import MlflowException

        from minigpt.generation.sampling import SamplingParams

        wanted = DEFAULTS | (params or {})
        in_range = (
            0 <= wanted["max_new_tokens"] <= 100_000
            and wanted["temperature"] >= 0
            and wanted["top_k"] >= 0
            and 0 < wanted["top_p"] <= 1
            and 0 <= wanted["min_p"] <= 1
            and wanted["repetition_penalty"] > 0
            and wanted["seed"] >= 0
            and all(wanted["stop"])
        )
        if not in_range:
            raise MlflowException.invalid_parameter_value(f"out of range: {wanted}")
        length = wanted.pop("max_new_tokens")
        try:
            with self.turn:  # requests come in several threads; each is to have all cores
                return [
                    self.generator.generate(prompt, length, SamplingParams(**wanted))[0]
                    for prompt in model_input["prompt"].tolist()
                ]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def package(model: Path, target: Path) -> None:
    """Write the exported model ``model`` as an MLflow model to ``target``, with the code that it needs."""
    from mlflow.models import ModelSignature

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    kinds = {int: DataType.long, float: DataType.double, list: DataType.string}
    parameters = [
        ParamSpec(name, kinds[type(value)], value, (-1,) if isinstance(value, list) else None)
        for name, value in DEFAULTS.items()
    ]
    prompts, texts = Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.string)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*input example", UserWarning)  # the signature is written out
        mlflow.pyfunc.save_model(
            target,
            python_model=__file__,
            artifacts={"model": str(model)},
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=REQUIREMENTS,
            signature=ModelSignature(prompts, texts, ParamSchema(parameters)),
        )


set_model(Writer())
