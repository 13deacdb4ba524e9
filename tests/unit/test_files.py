import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.workspace import ROOT, python

from minigpt import files
from minigpt.files import atomic_directory, parse_csv, write_csv


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


def test_files_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], files.fsync, Path.rename
    monkeypatch.setattr(files, "fsync", lambda path: (events.append(path.name), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to)))
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("text")
    assert events == ["a.txt", ".out-new.tmp", "rename", tmp_path.name]


def test_one_file_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, replace = [], files.fsync, Path.replace
    monkeypatch.setattr(files, "fsync", lambda path: (events.append(path.suffix), fsync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("replace"), replace(path, to)))
    files.write_atomically(tmp_path / "a.txt", b"text")
    assert events == [".tmp", "replace", tmp_path.suffix]


def test_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"old")

    def fail(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(tmp_path / "a.txt", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"old")]


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


def test_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a.txt").write_text(text)
        assert content(tmp_path / "disk/out") == {"a.txt": text}
        assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["out"]


def test_file_in_the_place_of_a_folder_is_replaced(tmp_path):
    for name in ("[out]", ".[out]-old.tmp", ".[out]-new.tmp"):
        (tmp_path / name).write_text("file")
    with atomic_directory(tmp_path / "[out]") as folder:
        (folder / "a.txt").write_text("new")
    assert content(tmp_path / "[out]") == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["[out]"]


@pytest.fixture
def mounted(workspace):
    """A workspace in which the results of three stages are mount points."""
    folders = [workspace / name for name in ("data/prepared", "models/gpt", "results/evaluate")]
    mounts = []
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            ran = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, text=True)
            if ran.returncode:
                pytest.skip(f"cannot mount here: {ran.stderr.strip()}")
            mounts.append(folder)
        yield workspace
    finally:
        for folder in mounts:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_mount_point_is_reported_before_any_work(mounted):
    for stage, output in (("prepare", "data/prepared"), ("train", "models/gpt"), ("evaluate", "results/evaluate")):
        ran = python("-m", f"stages.{stage}", cwd=mounted)
        problem = "it is a mount point, which cannot be replaced; mount the folder above it instead"
        assert ran.stderr == f"minigpt: cannot write {output}: {problem}\n"
        assert ran.returncode == 1
        assert not list((mounted / "data").glob(".prepared*"))


def test_file_in_the_place_of_a_parent_is_one_message(workspace):
    (workspace / "results").write_text("a file")
    ran = python("-m", "stages.sample", cwd=workspace)
    assert (ran.returncode, ran.stderr) == (1, "minigpt: cannot write results: File exists\n")


def test_csv_preserves_every_character(tmp_path):
    rows = [{"run": 'a "b",\n\u0915\u093f', "count": 1}, {"run": "", "count": 2}]
    write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{**row, "count": str(row["count"])} for row in rows]
    assert parse_csv("a,b,c,d\n,1.5,x\n1,2,3,4,5\n") == [
        {"a": None, "b": 1.5, "c": "x", "d": None},
        {"a": 1, "b": 2, "c": 3, "d": 4, None: ["5"]},
    ]
    write_csv(tmp_path / "empty.csv", [])
    assert not (tmp_path / "empty.csv").read_text().strip()


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with files.open_file(tmp_path / "file") as file:
        assert file.read() == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path, problem in [("pipe", "not a regular file"), ("/dev/zero", "not a regular file"), (".", "Is a directory")]:
        with pytest.raises(OSError, match=problem):
            files.open_file(tmp_path / path)


def test_anything_but_a_file_is_removed_from_its_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("pipe", "link", "folder", "file", "missing"):
        files.remove_unless_file(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_link_to_itself_is_replaced(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
    assert content(tmp_path / "out") == {"a.txt": "new"}


def test_old_directory_is_restored_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    rename, calls = Path.rename, []

    def interrupted(path, to):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupted)
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("new")
    assert content(tmp_path / "out") == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_old_directory_of_a_process_that_was_killed_between_two_renames_is_restored(tmp_path):
    (tmp_path / ".out-old.tmp").mkdir()
    (tmp_path / ".out-old.tmp/a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out"):
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == {"a.txt": "old"}
