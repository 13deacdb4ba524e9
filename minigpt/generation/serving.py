"""The exported model as an MLflow pyfunc: a table of prompts in, a list of texts out."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import pandas as pd  # not for its type alone: MLflow reads the type hints of `predict`
from mlflow.models import set_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from minigpt.errors import UserError
from minigpt.params import SamplingParams, validate

if TYPE_CHECKING:
    from minigpt.generation.generator import Generator

REQUIREMENTS = ["torch", "numpy", "pydantic", "safetensors", "tqdm", "filelock", "psutil"]
"""Packages that serving needs besides mlflow."""

LONGEST_TEXT = 100_000
"""Largest max_new_tokens of a request: longer texts would block the other clients for too long."""


class Writer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """MLflow model that continues prompts with the packaged model."""

    generator: Generator

    def load_context(self, context: Any) -> None:
        """Read the exported model, an artifact of the package."""
        from minigpt.generation.generator import Generator
        from minigpt.runtime.device import choose_device

        self.generator = Generator.load(Path(context.artifacts["model"]), choose_device("auto"))
        self.lock = threading.Lock()

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow passes it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """Continue each prompt of the column ``prompt``.

        Raises:
            MlflowException: a prompt has a character outside the vocabulary, or a parameter is out of range.
        """
        from mlflow.exceptions import MlflowException

        try:
            sampling = validate(SamplingParams, params or {})
            if sampling.max_new_tokens > LONGEST_TEXT:
                raise UserError(f"max_new_tokens: must be at most {LONGEST_TEXT}, got {sampling.max_new_tokens}")
            with self.lock:  # requests arrive in several threads, and each text uses all cores
                return [self.generator.generate(prompt, sampling)[0] for prompt in model_input["prompt"].tolist()]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def parameter_schema() -> ParamSchema:
    """Return MLflow's schema of :class:`SamplingParams`, with its names and defaults."""
    kinds = {int: DataType.long, float: DataType.double, str: DataType.string, list: DataType.string}
    return ParamSchema([
        ParamSpec(name, kinds[type(value)], value, (-1,) if isinstance(value, list) else None)
        for name, value in SamplingParams().model_dump().items()
    ])  # fmt: skip


def package(model: Path, target: Path) -> None:
    """Write the exported model ``model`` as an MLflow model to ``target``, with the code that it needs."""
    from mlflow.models import ModelSignature

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    prompts, texts = Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.string)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*input example", UserWarning)  # the signature is written out
        mlflow.pyfunc.save_model(
            target,
            python_model=__file__,
            artifacts={"model": str(model)},
            code_paths=[str(Path(__file__).parents[1])],
            pip_requirements=REQUIREMENTS,
            signature=ModelSignature(prompts, texts, parameter_schema()),
        )


set_model(Writer())
