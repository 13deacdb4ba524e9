"""The exported model as an MLflow pyfunc: a table of prompts in, a list of texts out."""

from __future__ import annotations

import ast
import asyncio
import functools
import json
import logging
import os
import re
import signal
import threading
from collections.abc import AsyncIterator
from collections.abc import Generator as PyGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import pandas as pd  # not for its type alone: MLflow reads the type hints of `predict`
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from minigpt.errors import UserError
from minigpt.params import SamplingParams, validate

if TYPE_CHECKING:
    from minigpt.generation.generator import Generator
    from minigpt.generation.scheduler import Scheduler

LONGEST_TEXT = 100_000
"""Largest number of characters of a request, in all its prompts and new texts together."""

LARGEST_BODY = 4 << 20
"""Bytes of the largest request that is read: LONGEST_TEXT and the longest stop strings, all escaped, take 2.5 MB."""

MOST_REQUESTS = 256
"""Requests that may wait for the model."""

SECONDS_TO_STOP = 5
"""Seconds in which requests may end after SIGTERM. Connections whose request never ends would delay the exit."""


class Writer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """MLflow model that continues prompts with the packaged model."""

    generator: Generator
    scheduler: Scheduler
    seconds: float | None = None
    """Seconds after which a request is ended; None outside a server."""

    def load_context(self, context: Any) -> None:
        """Read the exported model, an artifact of the package."""
        from minigpt.generation.generator import Generator
        from minigpt.generation.scheduler import Scheduler
        from minigpt.runtime.device import choose_device

        self.generator = Generator.load(Path(context.artifacts["model"]), choose_device("auto"))
        self.scheduler = Scheduler(MOST_REQUESTS)
        refuse_unknown_params()
        if "__pyfunc_model_path__" in os.environ:  # MLflow's server, which creates its application next
            self._prepare_application()

    def _prepare_application(self) -> None:
        """Let MLflow's application call :meth:`_serve` when it starts, and limit its requests; MLflow has no hooks."""
        import fastapi
        from starlette.middleware import Middleware

        @asynccontextmanager
        async def lifespan(_app: fastapi.FastAPI) -> AsyncIterator[None]:
            self._serve(asyncio.get_running_loop())
            yield

        application = functools.partial(fastapi.FastAPI, lifespan=lifespan, middleware=[Middleware(LimitedBody)])
        fastapi.FastAPI = application  # type: ignore[misc, assignment]

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare the server whose event loop this is for many requests, and for SIGTERM."""
        # MLflow answers 504 after this time, and leaves the work to its thread.
        self.seconds = 0.9 * float(os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60"))
        # By default there are a few threads: large requests would occupy all before the scheduler sees the small ones.
        loop.set_default_executor(ThreadPoolExecutor(MOST_REQUESTS + 8))
        handler = signal.getsignal(signal.SIGTERM)
        if callable(handler):

            def stop(signum: int, frame: FrameType | None) -> None:
                threading.Thread(target=self.scheduler.stop, daemon=True).start()  # a lock may be held here
                deadline = threading.Timer(SECONDS_TO_STOP, os._exit, (128 + signum,))
                deadline.daemon = True
                deadline.start()
                handler(signum, frame)

            signal.signal(signal.SIGTERM, stop)

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow passes it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """Continue each prompt of the column ``prompt``.

        Raises:
            MlflowException: a prompt has a character outside the vocabulary, a parameter is out of range, or the
                request is too large or cannot be answered in time.
        """
        from mlflow.exceptions import MlflowException

        from minigpt.generation.scheduler import RefusedError

        prompts = model_input["prompt"].tolist()
        try:
            sampling = validate(SamplingParams, params or {})
            work = check_work(prompts, sampling)
            for prompt in prompts:  # before the request waits for others
                self.generator.tokenizer.encode(prompt, "the prompt")
            return self.scheduler.run(self._texts(prompts, sampling), work, self.seconds)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except RefusedError as error:
            raise MlflowException(f"{error}; try again later", error_code=TEMPORARILY_UNAVAILABLE) from None
        except TimeoutError:
            message = f"the request took longer than {self.seconds:g} s; use a smaller max_new_tokens, or fewer prompts"
            raise MlflowException(message, error_code=TEMPORARILY_UNAVAILABLE) from None

    def _texts(self, prompts: list[str], sampling: SamplingParams) -> PyGenerator[None, None, list[str]]:
        """Return the texts, and yield after each character."""
        texts = []
        for prompt in prompts:
            pieces = [prompt]
            for (piece,) in self.generator.stream(prompt, sampling):
                pieces.append(piece)
                yield
            texts.append("".join(pieces))
        return texts


class LimitedBody:
    """ASGI middleware that refuses requests without a content type or with a large body, before they fill the memory.

    MLflow's application answers errors with status 400 if they are raised while it reads the request. It does not
    expect some errors in the JSON, such as deep nesting, and some of its answers contain a traceback.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from mlflow.exceptions import MlflowException
        from starlette.responses import JSONResponse

        headers, received = dict(scope["headers"]), 0
        start: dict[str, Any] = {}

        async def limited() -> Any:
            nonlocal received
            if not headers.get(b"content-type", b"").strip():
                raise MlflowException.invalid_parameter_value("the header Content-Type is missing: application/json")
            message = await receive()
            received += len(message.get("body", b""))
            if max(received, int(headers.get(b"content-length", b"0"))) > LARGEST_BODY:
                raise MlflowException.invalid_parameter_value(f"a request can have {LARGEST_BODY:,} bytes")
            return message

        async def without_traceback(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            if start.get("status", 0) >= 400 and b'"stack_trace"' in message.get("body", b""):
                content = json.loads(message["body"])
                reason = content.pop("stack_trace").strip().rpartition("\n")[2]
                content["message"] = f"{content['message']} {reason}"[:1000]
                await JSONResponse(content, start["status"])(scope, receive, send)
                return
            if start:
                await send(dict(start))
                start.clear()
            await send(message)

        try:
            await self.app(scope, limited, without_traceback)
        except Exception as error:  # MLflow reports those of the model itself
            reason = "its JSON is nested too deeply" if isinstance(error, RecursionError) else repr(error)[:200]
            content = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"the request cannot be read: {reason}"}
            await JSONResponse(content, 400)(scope, receive, send)


def check_work(prompts: list[str], sampling: SamplingParams) -> int:
    """Return the number of characters of a request. Raise UserError for too many, or a damaged prompt."""
    if sampling.max_new_tokens > LONGEST_TEXT:
        raise UserError(f"max_new_tokens: must be at most {LONGEST_TEXT}, got {sampling.max_new_tokens}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"prompt: expected a text, got {str(prompt)[:100]!r}")
    work = sum(map(len, prompts)) + len(prompts) * sampling.max_new_tokens
    if work > LONGEST_TEXT:
        raise UserError(
            f"a request can have {LONGEST_TEXT:,} characters, but {len(prompts):,} prompts and max_new_tokens "
            f"{sampling.max_new_tokens:,} are {work:,}"
        )
    return work


def refuse_unknown_params() -> None:
    """Make unknown parameters an error. MLflow drops them before it calls ``predict``, and only logs a warning."""
    from mlflow.exceptions import MlflowException

    def refuse(record: logging.LogRecord) -> bool:
        found = re.match(r"Unrecognized params (\[.*?\]) are ignored", record.getMessage(), re.DOTALL)
        if found:
            try:
                validate(SamplingParams, dict.fromkeys(ast.literal_eval(found[1])))
            except UserError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
        return True

    logger = logging.getLogger("mlflow.models.utils")
    logger.setLevel(logging.WARNING)
    logger.addFilter(refuse)


set_model(Writer())
