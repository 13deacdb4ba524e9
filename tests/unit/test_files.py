import csv
import os
import signal
import subprocess
import sys

import pytest
from helpers.workspace import ROOT

from minigpt.files import atomic_directory, write_csv


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_directory_replaces_the_old_one_atomically(tmp_path):
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "deep" / "out") as folder:
            (folder / f"{text}.txt").write_text(text)
            assert not (tmp_path / "deep/out" / f"{text}.txt").exists()
    assert content(tmp_path / "deep/out") == {"new.txt": "new"}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_error_leaves_only_the_old_directory(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_remains_of_a_killed_process_are_removed_by_the_next_write(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from minigpt.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert content(tmp_path / "out") == {"a.txt": "old"}
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
    assert content(tmp_path / "out") == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_csv_preserves_every_character(tmp_path):
    rows = [{"run": 'a "b",\n\u0915\u093f', "count": 1}, {"run": "", "count": 2}]
    write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{**row, "count": str(row["count"])} for row in rows]
    write_csv(tmp_path / "empty.csv", [])
    assert not (tmp_path / "empty.csv").read_text().strip()
