"""Profiles: named sets of values for ``params.yaml``, stored in ``configs/`` as differences.

The profile ``default`` holds the original value of every key that some profile sets. Applying a profile sets the values
of ``default`` and then its own, so profiles can follow one another. Keys that no profile sets keep the user's values.
"""

import io
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from minigpt import params, texts
from minigpt.errors import UserError
from minigpt.files import write_atomically

DIRECTORY, PARAMS = Path("configs"), Path("params.yaml")
DEFAULT = "default"


def names(root: Path = Path()) -> list[str]:
    """Return the names of all profiles, the default first."""
    return sorted((path.stem for path in (root / DIRECTORY).glob("*.yaml")), key=lambda name: (name != DEFAULT, name))


def describe(name: str, root: Path = Path()) -> str:
    """Return the first line of the comment at the start of a profile."""
    return params.read_text(root / DIRECTORY / f"{name}.yaml").partition("\n")[0].removeprefix("# ")


def apply(name: str, text: str, root: Path = Path(), source: str = "") -> str:
    """Return the text of ``params.yaml`` with the values of a profile, and ``source`` as ``data.source`` if given.

    Comments and layout are kept.
    """
    if name not in names(root):
        raise UserError(f"{root / DIRECTORY / name}.yaml: no such profile; `minigpt profile` lists them")
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 16  # else long values are wrapped
    tree = _load(yaml, text, str(root / PARAMS))
    for profile in (DEFAULT, name):
        path = root / DIRECTORY / f"{profile}.yaml"
        for section, values in _load(yaml, params.read_text(path), str(path)).items():
            if isinstance(values, dict) and isinstance(tree.get(section), dict):
                tree[section].update(values)
            else:  # a mistake, which the validation reports
                tree[section] = values
    if source:
        tree["data"]["source"] = source
    written = io.StringIO()
    yaml.dump(tree, written)
    return written.getvalue()


def _load(yaml: YAML, text: str, source: str) -> Any:
    """Return the sections of a YAML text, with its comments and layout."""
    if not isinstance(params.read_yaml(text, source) or {}, dict):  # reports other mistakes
        raise UserError(f"{source}: expected sections of keys and values")
    return yaml.load(text) or {}


def load_profile(name: str, root: Path = Path(), source: str = "") -> params.Params:
    """Return the params of ``params.yaml`` in ``root`` with a profile and, if given, the text ``source``."""
    text = params.read_text(root / PARAMS)
    return params.parse(apply(name, text, root, source), f"{root / DIRECTORY / name}.yaml")


def is_applied(name: str) -> bool:
    """Return whether ``params.yaml`` has all values of a profile."""
    return load_profile(name) == params.load(PARAMS)


def write(name: str, force: bool = False, source: str = "") -> None:
    """Apply a profile to ``params.yaml``, with the text ``source`` or else its own, which is fetched if it is missing.

    Only ``force`` overwrites values that neither git nor a profile holds.
    """
    from minigpt.data import checks  # imports NumPy, which the help does not need

    params.load(PARAMS)
    if source and not Path(source).exists():
        raise UserError(f"{source}: no such file or folder; --source names a text inside this repository")
    settings = load_profile(name, source=source)
    checks.check_paths(settings)
    if not (force or _is_committed() or any(map(is_applied, names()))):
        raise UserError(
            f"{PARAMS}: has changes that are not committed to git, and the profile would overwrite them; "
            "commit the file, or use --force to overwrite it"
        )
    texts.fetch(Path(settings.data.source))
    write_atomically(PARAMS.resolve(), apply(name, params.read_text(PARAMS), source=source).encode())


def _is_committed() -> bool:
    """Return whether git holds ``params.yaml`` as it is; outside a repository and without git, it does not."""
    command = ["git", "status", "--porcelain", "--ignored", "--", str(PARAMS)]
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout == b""
    except (FileNotFoundError, subprocess.CalledProcessError):
        return False
