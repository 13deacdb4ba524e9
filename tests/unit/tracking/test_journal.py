"""Tests of the journal: its records, and its behavior after crashes and with concurrent writers."""

import json
import subprocess
import sys
import threading

from helpers.tracking import write_run
from helpers.workspace import ROOT

from minigpt.tracking.journal import Journal, locked


def test_resumed_training_records_no_step_twice():
    for _ in range(2):
        journal = Journal("b" * 32)
        for step in (0, 5, 10):
            journal.metrics(step, {"val_loss": step})
    assert [record["step"] for record in Journal("b" * 32).records()] == [0, 5, 10]


def test_artifact_is_recorded_again_only_if_it_changed(here):
    journal = Journal("b" * 32)
    (here / "model/code").mkdir(parents=True)
    (here / "model/MLmodel").write_text("one")
    (here / "model/code/a.py").write_text("pass")
    for _ in range(2):
        journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()] == ["model/MLmodel", "model/code/a.py"]
    (here / "model/MLmodel").write_text("two")
    journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()][2:] == ["model/MLmodel"]
    (here / "model/MLmodel").write_text("three")
    (journal.folder / "artifacts/model/MLmodel").write_text("three")  # copied, but killed before the record
    journal.artifact(here / "model")
    assert [record["path"] for record in journal.records()][3:] == ["model/MLmodel"]


def test_truncated_and_damaged_lines_are_skipped():
    journal = Journal("b" * 32)
    journal.tags({"a": "1"})
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "tags", "val')
    assert len(journal.records()) == 1
    Journal("b" * 32).tags({"b": "2"})
    with (journal.folder / "journal.jsonl").open("ab") as file:
        file.write(b"\0\0\xff\n")
    journal.tags({"c": "3"})
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "tags"')  # a full disk truncates a line without ending the process
    journal.tags({"d": "4"})
    assert [record["values"] for record in Journal("b" * 32).records()] == [
        {n: v} for n, v in zip("abcd", "1234", strict=True)
    ]


def test_journal_is_lines_of_json():
    journal = write_run(steps=10)
    lines = (journal.folder / "journal.jsonl").read_text().splitlines()
    assert all({"kind", "time"} <= set(json.loads(line)) for line in lines)


def test_concurrent_writers_lose_no_record():
    def write(name):
        journal = Journal("e" * 32)
        for number in range(100):
            journal.tags({name: str(number) * 50})

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (Journal("e" * 32).folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["tags"] * 400


def test_writer_waits_for_a_lock_until_its_process_is_killed(here):
    journal = Journal("e" * 32)
    journal.tags({"a": "1"})
    code = (
        "import sys, pathlib, time; from minigpt.tracking.journal import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, journal.folder / "journal.jsonl"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    writer = threading.Thread(target=journal.tags, args=({"b": "2"},), daemon=True)
    writer.start()
    writer.join(0.3)
    assert len(journal.records()) == 1
    holder.kill()
    holder.communicate()
    writer.join(30)
    assert len(journal.records()) == 2
    with locked(journal.folder / "journal.jsonl"):
        assert len(journal.records()) == 2
