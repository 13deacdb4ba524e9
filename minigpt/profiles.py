"""Profiles: named sets of values for ``params.yaml``, stored in ``configs/`` as differences.

The profile ``default`` holds the original value of every key that some profile sets. Applying a profile sets the values
of ``default`` and then its own, so profiles can follow one another. Keys that no profile sets keep the user's values.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from minigpt import params
from minigpt.errors import UserError

DIRECTORY = Path("configs")
PARAMS = Path("params.yaml")
DEFAULT = "default"


def names(root: Path = Path()) -> list[str]:
    """Return the names of all profiles, the default first."""
    found = sorted(path.stem for path in (root / DIRECTORY).glob("*.yaml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def describe(name: str, root: Path = Path()) -> str:
    """Return the first line of the comment at the start of a profile."""
    return (root / DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def apply(name: str, text: str, root: Path = Path()) -> str:
    """Return the text of ``params.yaml`` with the values of a profile; comments and layout are kept.

    Raises:
        UserError: there is no such profile, or a file is not a YAML mapping without duplicate keys.
    """
    if name not in names(root):
        raise UserError(f"{root / DIRECTORY / name}.yaml: no such profile; `minigpt profile` lists them")
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 16  # else long values are wrapped
    try:
        tree = yaml.load(text)
        for profile in (DEFAULT, name):
            for section, values in (yaml.load(root / DIRECTORY / f"{profile}.yaml") or {}).items():
                if isinstance(values, dict) and section in tree:
                    tree[section].update(values)
                else:  # a mistake, which the validation reports
                    tree[section] = values
    except (YAMLError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{PARAMS} or {DIRECTORY / name}.yaml: not readable as YAML: {reason}") from None
    written = io.StringIO()
    yaml.dump(tree, written)
    return written.getvalue()


def load_profile(name: str, root: Path = Path()) -> params.Params:
    """Return the params of ``params.yaml`` in the folder ``root`` with the values of a profile.

    Raises:
        UserError: there is no such profile, or a value is wrong.
    """
    text = (root / PARAMS).read_text(encoding="utf-8")
    return params.parse(apply(name, text, root), f"{DIRECTORY / name}.yaml")


def is_applied(name: str) -> bool:
    """Return whether ``params.yaml`` has all values of a profile."""
    return load_profile(name) == params.load(PARAMS)


def write(name: str, force: bool = False) -> None:
    """Apply a profile to ``params.yaml``.

    Values that neither git nor a profile holds are overwritten only with ``force``.

    Raises:
        UserError: there is no such profile, ``params.yaml`` is not valid, or it would be overwritten.
    """
    params.load(PARAMS)
    load_profile(name)
    if not (force or _is_committed() or any(map(is_applied, names()))):
        raise UserError(
            f"{PARAMS}: has changes that are not committed to git, and the profile would overwrite them; "
            "commit the file, or use --force to overwrite it"
        )
    PARAMS.write_text(apply(name, PARAMS.read_text(encoding="utf-8")), encoding="utf-8")


def _is_committed() -> bool:
    """Return whether git holds ``params.yaml`` as it is; outside a repository and without git, it does not."""
    try:
        status = subprocess.run(
            ["git", "status", "--porcelain", "--ignored", "--", PARAMS], check=False, capture_output=True
        )
    except FileNotFoundError:
        return False
    return status.returncode == 0 and not status.stdout
