"""Answers of git about the repository of the user's text and params."""

import subprocess
from pathlib import Path


def git(*arguments: str, folder: Path = Path()) -> str:
    """Return the output of a git command, without the last line ends; empty if it fails or git is not installed."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.rstrip()


def is_untracked(path: str) -> bool:
    """Return whether a file or folder of a git repository exists, and neither git nor a .dvc file there knows it."""
    inside = git("rev-parse", "--is-inside-work-tree") == "true" and Path(path).exists()
    records = [f"{part}.dvc" for part in (Path(path), *Path(path).parents)]
    return inside and not git("ls-files", "--", path, *records)
