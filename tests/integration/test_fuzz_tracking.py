"""Damaged and odd inputs of tracking, and of the environment: journals, progress files, variables.

Each input is accepted, or refused in one line: no traceback, no hang, no file outside the workspace.
"""

import json
import shutil
import sys

import pytest
import torch
from helpers.fuzzing import ODD_NUMBERS, changed_bytes, changed_json, enter_workspace, fuzz, kinds, place, run_program
from helpers.tracking import check_store, find_run, write_run
from hypothesis import strategies as st

from minigpt.cli import main as command
from minigpt.generation.compiler import library_path
from minigpt.runtime.cpu import hold_locks, limit_to_share
from minigpt.runtime.distributed import join_process_group
from minigpt.runtime.launcher import launch
from minigpt.tracking.journal import Journal
from minigpt.tracking.store import resolve_tracking_uri
from minigpt.training.control import CheckpointTimer
from stages.train import check_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Return an empty repository, the current directory."""
    enter_workspace(monkeypatch, tmp_path)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(sys, "argv", ["minigpt", "sync"])
    return tmp_path


def journal_of(number):
    """Write the journal of a run, and return its key and its bytes."""
    journal = write_run(f"{number:032x}", steps=3)
    return journal.key, (journal.folder / "journal.jsonl").read_bytes()


def test_any_journal_is_sent_or_refused(here):
    """The store also gets another run, whose journal is intact; this is checked in every tenth case."""
    _, data = journal_of(0)
    shutil.rmtree(here / ".journal")
    lines = data.splitlines()
    line = st.sampled_from(range(len(lines)))
    changes = st.one_of(
        changed_bytes(data),
        *(
            st.tuples(line, changed_json(json.loads(record))).map(
                lambda drawn: b"\n".join([*lines[: drawn[0]], drawn[1], *lines[drawn[0] :]]) + b"\n"
            )
            for record in lines
        ),
    )
    names = st.sampled_from(["journal.jsonl"] * 6 + ["journal.jsonl.lock", "artifacts/sample/notes.txt", "artifacts"])
    number = 0

    def case(drawn):
        nonlocal number
        number += 2
        shutil.rmtree(here / ".journal", ignore_errors=True)
        checked = number % 20 == 0
        intact = journal_of(number)[0] if checked else ""
        spoiled, _ = journal_of(number + 1)
        name, kind, content = drawn
        path = here / ".journal" / spoiled / name
        if path.is_dir():
            shutil.rmtree(path)
        place(path, kind, content)
        run_program(command, here)
        if checked:
            assert find_run(resolve_tracking_uri(), intact)[1].info.status == "FINISHED"

    fuzz(st.tuples(names, kinds, changes), case)


def test_any_progress_file_leaves_a_complete_store(here):
    (here / "params.yaml").touch()
    run_program(command, here)
    uri, number = resolve_tracking_uri(), 0
    progress = {"store": "sqlite", "next": 300, "in_flight": 400}

    def case(drawn):
        nonlocal number
        number += 1
        shutil.rmtree(here / ".journal", ignore_errors=True)
        key, _ = journal_of(number)
        kind, content, first = drawn
        if first:
            run_program(command, here)
        folder = Journal(key).folder
        (path,) = folder.glob("sent-*.json") if first else [folder / "sent-00000000.json"]
        place(path, kind, content)
        code, message = run_program(command, here)
        assert not code, message
        check_store(uri, key)

    fuzz(st.tuples(kinds, changed_json(progress), st.booleans()), case)


variables = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from([str(number) for number in ODD_NUMBERS]),
    st.sampled_from(["", " ", "-", "none", "1_0", "1e3", "0x10", "\udcff", "'", '"x', "a\nb", "/dev/null", "."]),
)
addresses = st.builds(
    lambda start, middle, end: start + middle + end,
    st.sampled_from(["", "http://", "https://u:p@", "http://[", "sqlite:///", "sqlite+x:///", "file:", "x:"]),
    variables,
    st.sampled_from(["", "/", ".db", "?a=b", ":99999", "@host", "%2F"]),
)  # fmt: skip


def test_any_variable_of_tracking_is_accepted_or_refused(here):
    """`minigpt sync` resolves the address of the store, and has nothing to send."""
    names = ["DAGSHUB_REPO", "DAGSHUB_USER_TOKEN", "DAGSHUB_CLIENT_HOST", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT"]
    names += [
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
        "RANK",
        "WORLD_SIZE",
    ]
    settings = st.dictionaries(st.sampled_from(names), variables, max_size=4)

    def case(drawn):
        variables, address = drawn
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (variables | {"MLFLOW_TRACKING_URI": address}).items():
                patch.setenv(name, value)
            code, message = run_program(command, here)
            reasons = ("MLFLOW_TRACKING_URI: ", "DAGSHUB_", "File name too long")
            assert not code or any(reason in message for reason in reasons), message

    fuzz(st.tuples(settings, st.just("") | addresses), case)


def test_any_variable_of_the_training_is_accepted_or_refused(here):
    def join():
        with join_process_group("cpu", 1):
            pass

    names = {
        "MINIGPT_CHECKPOINT_SECONDS": lambda: CheckpointTimer(0).due(1),
        "MINIGPT_CHECKPOINT_STEPS": lambda: CheckpointTimer(0).due(1),
        "MINIGPT_PEER_SECONDS": join,
        "RANK": join,
        "WORLD_SIZE": join,
        "LOCAL_RANK": limit_to_share,
        "LOCAL_WORLD_SIZE": limit_to_share,
        "MINIGPT_LAUNCH": lambda: launch("stages.train", 1),
        "XDG_CACHE_HOME": library_path,
        "XDG_RUNTIME_DIR": lambda: hold_locks(["fuzz"]),
        "CXX": lambda: check_decoder(torch.device("cpu")),
    }

    def case(drawn):
        name, value = drawn
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, f"no-program{value}" if name in ("MINIGPT_LAUNCH", "CXX") else value)
            code, message = run_program(names[name], here)
            assert not code or any(word in message for word in (name, "C++ compiler", "train.grad_accum")), message

    fuzz(st.tuples(st.sampled_from(list(names)), variables), case)
