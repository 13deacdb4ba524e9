"""Tests of journals, progress files and run keys with contents that this project did not write."""

import json
import os
import random
import time

import pytest
from helpers.tracking import check_store, find_run, write_run
from helpers.workspace import python

from minigpt.errors import UserError
from minigpt.tracking import store, uploader
from minigpt.tracking.journal import Journal
from minigpt.tracking.records import parse
from minigpt.tracking.run import Tracker, tracker_of_model
from minigpt.tracking.uploader import Progress, Uploader

TIME = '"time": 1'
NO_RECORDS = [
    "", "17", "null", '"text"', "[]", "[1]", "{}", '{"time": 1}', '{"kind": "metrics"}', f'{{"kind": "other", {TIME}}}',
    f'{{"kind": 3, {TIME}}}', f'{{"kind": "metrics", {TIME}}}',
    f'{{"kind": "metrics", {TIME}, "step": 1, "values": []}}',
    f'{{"kind": "metrics", {TIME}, "step": -1, "values": {{}}}}',
    f'{{"kind": "metrics", {TIME}, "step": 1e99, "values": {{}}}}',
    f'{{"kind": "metrics", {TIME}, "step": {10**30}, "values": {{}}}}',
    f'{{"kind": "metrics", {TIME}, "step": 1, "values": {{"loss": "low"}}}}',
    '{"kind": "status", "time": "now", "status": "RUNNING"}', f'{{"kind": "status", {TIME}, "status": "DONE"}}',
    f'{{"kind": "tags", {TIME}, "values": {{"a": 1}}}}', f'{{"kind": "name", {TIME}, "name": null}}',
    f'{{"kind": "artifact", {TIME}, "path": "../../x"}}', f'{{"kind": "artifact", {TIME}, "path": "/etc/passwd"}}',
    f'{{"kind": "artifact", {TIME}, "path": ""}}', f'{{"kind": "artifact", {TIME}, "path": "a/../../b"}}',
    f'{{"kind": "dataset", {TIME}, "name": "a", "source": "b", "digest": "c", "profile": [1]}}',
    "[" * 50_000, "\ufeff{}",
]  # fmt: skip
"""Damaged lines of a journal: other JSON, wrong fields, paths outside the folder."""
NO_PROGRESS = [
    '{"next": -5, "in_flight": 0}', '{"next": -5}', '{"next": 120}', '{"next": 1e400, "in_flight": 3}',
    '{"next": true}',
    '{"next": "12", "in_flight": 12}', '{"next": 10, "in_flight": -1}', '{"next": 7, "in_flight": 900}',
    f'{{"next": {10**30}, "in_flight": 0}}', '{"nex', "[]", "17", "null", "", "[" * 50_000, None,
]  # fmt: skip
"""Damaged progress files: wrong types, and offsets inside a record or outside the journal."""


@pytest.mark.parametrize("line", NO_RECORDS, ids=lambda line: line[:60])
def test_line_that_is_no_record_is_skipped_wherever_it_is(line):
    for position in (0, 3, -1):
        key = f"{position % 16:x}" * 32
        journal = write_run(key, steps=3)
        path = journal.folder / "journal.jsonl"
        lines = path.read_text().splitlines()
        lines.insert(position, line)
        path.write_text("".join(f"{each}\n" for each in lines))
        assert len(journal.records()) == len(lines) - 1
    with pytest.raises(ValueError, match=r".*"):
        parse(line.encode())


def test_runs_with_spoiled_journals_are_sent_and_extended(here, capsys):
    """One store receives all runs, although each journal has another damaged line."""
    keys = [f"{number:032x}" for number in range(1, len(NO_RECORDS) + 1)]
    for key, line in zip(keys, NO_RECORDS, strict=True):
        journal = write_run(key, steps=2)
        path = journal.folder / "journal.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("".join(f"{each}\n" for each in (line, first, *others, line)))
    assert uploader.sync() == len(keys)
    uri = store.resolve_tracking_uri()
    for key in keys[::7]:
        check_store(uri, key)
        Tracker(key).stage("sample", {}, {"loss": 1.0})
        check_store(uri, key)
    assert "Traceback" not in capsys.readouterr().err


def test_spoiled_first_line_costs_only_the_name(here):
    journal = write_run(steps=3)
    path = journal.folder / "journal.jsonl"
    path.write_bytes(b"\0\0\xff" + path.read_bytes()[3:])
    assert uploader.sync() == 1
    Tracker(journal.key).stage("evaluate", {}, {"val.loss": 1.0})
    _, run = find_run(store.resolve_tracking_uri())
    assert run.data.metrics.keys() == {"train_loss", "val_loss", "results/val_loss"}


@pytest.mark.parametrize("content", NO_PROGRESS, ids=lambda content: str(content)[:40])
def test_damaged_progress_counts_every_byte_as_possibly_sent(here, content):
    journal, path = write_run(steps=3), here / "sent.json"
    if content is not None:
        path.write_text(content)
    progress = Progress(path, journal)
    assert (progress.sent, progress.in_flight) == (0, journal.size)
    progress.save(130, 350)
    assert json.loads(path.read_text()) == {"store": "", "next": 130, "in_flight": 350}


@pytest.mark.parametrize("name", ["in_flight", "doubtful"])  # earlier versions wrote "doubtful"
def test_progress_is_read_back(here, name):
    journal = write_run(steps=3)
    end = journal.since(0)[2][1]
    (here / "sent.json").write_text(json.dumps({"store": "sqlite", "next": end, name: 34000}))
    progress = Progress(here / "sent.json", journal)
    assert (progress.sent, progress.in_flight) == (end, 34000)


def test_store_is_complete_after_any_damage_to_the_progress(here):
    journal = write_run(steps=30)
    uri = store.resolve_tracking_uri()
    uploader.sync()
    (path,) = journal.folder.glob("sent-*.json")
    for content in NO_PROGRESS[:-1]:
        path.write_text(content)
        journal.metrics(1000 + len(content), {"val_loss": 1.0})
        Uploader(uri).send(journal)
    path.unlink()
    path.mkdir()  # a folder has the name of the file
    (journal.folder / f"{path.name}.lock").unlink()
    (journal.folder / f"{path.name}.lock").mkdir()
    uploader.sync()
    check_store(uri)


def test_runs_after_a_bad_one_are_sent(here, capsys):
    for number, key in enumerate("abcdef"):
        write_run(key * 32, steps=3)
        path = Journal(key * 32).folder / "journal.jsonl"
        path.write_text(path.read_text().replace('"time": 1', f'"time": {number + 1}'))
    journals = {key: Journal(key * 32).folder for key in "abcde"}
    (journals["a"] / "artifacts/sample/notes.txt").unlink()
    (journals["b"] / "journal.jsonl").unlink()
    (journals["b"] / "journal.jsonl").mkdir()
    path = journals["c"] / "journal.jsonl"  # a value that the store refuses
    path.write_text(path.read_text().replace('"train_loss"', '"\\u0000 <loss>"'))
    path = journals["d"] / "journal.jsonl"
    path.write_text(path.read_text().replace('"name": "a run"', '"name": ""'))
    (here / ".journal/not-a-key").mkdir()
    (here / ".journal/not-a-key/journal.jsonl").write_text(path.read_text())
    with pytest.raises(UserError) as failed:
        uploader.sync()
    uri = store.resolve_tracking_uri()
    assert f"{journals['b']}: cannot read the journal: Is a directory" in str(failed.value)
    assert "run cccccccc was not sent to sqlite:" in str(failed.value)
    assert "notes.txt: no such file; run aaaaaaaa is sent without it" in capsys.readouterr().err
    for key in "ef":
        check_store(uri, key * 32)
    assert find_run(uri, "a" * 32)[1].info.status == "FINISHED"


def test_sync_reports_bad_runs_in_one_line_each(repository, minigpt):
    write_run("b" * 32, steps=3)
    folder = write_run("a" * 32, steps=3).folder
    (folder / "journal.jsonl").unlink()
    (folder / "journal.jsonl").mkdir()
    ran = minigpt("sync")
    assert ran.returncode == 1
    assert ran.stderr == f"minigpt: {folder}: cannot read the journal: Is a directory\n"
    assert "run bbbbbbbb: " in ran.stdout
    check_store(store.resolve_tracking_uri(), "b" * 32)


def test_random_bytes_in_a_journal_are_never_an_error(here):
    path = write_run(steps=5).folder / "journal.jsonl"
    data, generator = path.read_bytes(), random.Random(0)
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 20)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed[: generator.randrange(len(changed) + 1)])
        assert all({"kind", "time"} <= record.keys() for record in Journal("a" * 32).records())


KEYS = ["../../x", "/etc/x", "a" * 31, "A" * 32, "a" * 32 + "\n", "", "..", 3, None, ["a" * 32]]


def test_run_record_from_dvc_pull_cannot_name_a_path(here):
    for key in KEYS:
        (here / "run.json").write_text(json.dumps({"run": key}))
        with pytest.raises(UserError, match=r"run.json: does not name a run .*; create it with `dvc repro train`"):
            tracker_of_model(here / "run.json")
        with pytest.raises(UserError, match="a run has a key of 32 hexadecimal digits, not "):
            Journal(key)
    assert {path.name for path in here.iterdir()} == {"run.json", "mlflow.db"}
    (here / "run.json").unlink()
    os.mkfifo(here / "run.json")
    began = time.monotonic()
    with pytest.raises(UserError, match="is not a regular file"):
        tracker_of_model(here / "run.json")
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_stage_rejects_a_run_record_that_names_a_path(workspace):
    (workspace / "results/train").mkdir(parents=True)
    (workspace / "results/train/run.json").write_text('{"run": "../../x"}')
    ran = python("-m", "stages.evaluate", cwd=workspace)
    assert ran.returncode == 1
    assert ran.stderr.startswith("minigpt: results/train/run.json: does not name a run (expected")
    assert "../../x" in ran.stderr.splitlines()[0]
    assert not (workspace.parent / "x").exists()
    assert not (workspace / ".journal").exists()
