"""Records of a journal: one JSON object per line, with the fields that its ``kind`` requires."""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

Count = Annotated[int, Field(ge=0, lt=2**63)]  # a database stores it in 64 bits
Strings = dict[str, str]


def check_relative(path: str) -> str:
    """Return a path if it stays in its folder; otherwise raise ValueError."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("must be a relative path without ..")
    return path


class _Record(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    time: Count  # milliseconds since 1970


class _Metrics(_Record):
    kind: Literal["metrics"]
    step: Count
    values: dict[str, float]


class _Params(_Record):
    kind: Literal["params", "tags"]
    values: Strings


class _Name(_Record):
    kind: Literal["name"]
    name: str
    experiment: NotRequired[str]
    restored: NotRequired[bool]


class _Dataset(_Record):
    kind: Literal["dataset"]
    name: str
    source: str
    digest: str
    profile: dict[str, Count]


class _Artifact(_Record):
    kind: Literal["artifact"]
    path: Annotated[str, AfterValidator(check_relative)]
    digest: NotRequired[str]


class _Status(_Record):
    kind: Literal["status"]
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


_RECORD: TypeAdapter[Any] = TypeAdapter(
    Annotated[_Metrics | _Params | _Name | _Dataset | _Artifact | _Status, Field(discriminator="kind")]
)


def parse(line: bytes) -> dict[str, Any]:
    """Return the record of a line. Raise ValueError if it is none."""
    return _RECORD.validate_json(line)
