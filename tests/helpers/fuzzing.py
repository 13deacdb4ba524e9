"""Fuzzing of inputs: strategies that damage valid files and values, and a guard for the code that reads them."""

import contextlib
import copy
import errno
import io
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.workspace import FULL
from minigpt import program

CASES = 500 if FULL else 150
"""Values of a strategy, at least."""
CPU_SECONDS, WALL_SECONDS = 5, 60
"""Limits of one case. The limit of the elapsed time is for waiting, and generous because the machine may be busy."""
MEMORY = 2 << 30
"""Bytes that a case may allocate in addition."""

ODD_NUMBERS = [
    0, -0.0, 1, -1, 2, 7, 1e-320, 1e-45, 1e-9, 0.5, 1e9, 1e12, 1e300, -1e300, 10**6, 10**12, 10**14, 2**31, 2**53 + 1,
    2**63 - 1, 2**63, 2**64, 10**30, 10**400, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
ODD_TEXTS = [
    "", "\n", "a", "1", "010", "1:30", "yes", "null", "NaN", "../../x", "/dev/zero", "/etc/passwd", "\0", "\ud800",
    "e\u0301", "रोज", "\U0001f469\u200d\U0001f467", "\ufeff", "a" * 5000, "${x}", "%2F", "'\"", "\x1b[31m",
    "cuda:99999",
]  # fmt: skip
ODD_BYTES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x80", b"\r", b"\r\n", b"\n", b"[" * 20_000,
    b'{"a":' * 20_000, b"9" * 5000, b"1e999", b"-1", b"NaN", b"Infinity", b"null", b"true", b'"', b"\\", b"\\ud800",
    b"../../x", b"{}", b"[]", b"&a [*a]", b"*a", b"<<: *a", b"!!binary x", b"!!python/name:os.system", b"? ", b"---\n",
    b"%YAML 1.1\n---\n", b"\t",
]  # fmt: skip

scalars = st.one_of(
    st.sampled_from([None, True, False, *ODD_NUMBERS, *ODD_TEXTS]), st.integers(), st.floats(), st.text(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
"""Values of JSON, many of them extreme."""


@st.composite
def changed_tree(draw, tree):
    """Draw a copy of a tree of dictionaries and lists in which up to three values are replaced, removed or added."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        parent = root
        key = 0
        while isinstance(inner := parent[key], dict | list) and inner and draw(st.integers(0, 7)):
            parent, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        change = draw(st.sampled_from(["replace", "replace", "replace", "add", "remove", "nest"]))
        if change == "remove" and parent is not root:
            del parent[key]
        elif change == "add" and isinstance(parent[key], dict):
            parent[key][draw(st.text(max_size=12))] = draw(values)
        elif change == "nest":
            for _ in range(draw(st.sampled_from([1, 2, 300]))):
                parent[key] = [parent[key]]
        else:
            parent[key] = draw(values)
    return root[0]


@st.composite
def changed_bytes(draw, data):
    """Draw a copy of ``data`` that is cut, doubled, encoded otherwise, or has odd bytes at some places."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 100])))
        change = draw(st.sampled_from(["odd", "odd", "odd", "flip", "cut", "repeat", "remove", "encode"]))
        if change == "odd":
            data = data[:start] + draw(st.sampled_from(ODD_BYTES) | st.binary(max_size=6)) + data[end:]
        elif change == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
        elif change == "cut":
            data = data[:start]
        elif change == "repeat":
            data = data[:end] + data[start:]
        elif change == "remove":
            data = data[:start] + data[end:]
        elif change == "encode":
            encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp500", "utf-7"]))
            data = data.decode(errors="replace").encode(encoding, "replace")
    return data


def changed_json(tree):
    """Return a strategy for the bytes of a JSON file with a changed tree, a repeated key, or changed bytes."""
    trees = changed_tree(tree).map(lambda changed: json.dumps(changed).encode())
    data = json.dumps(tree).encode()
    key = next(iter(tree), "a") if isinstance(tree, dict) else "a"
    repeated = values.map(lambda value: b"{" + json.dumps({key: value}).encode()[1:-1] + b"," + data[1:])
    return st.one_of(trees, trees, repeated, changed_bytes(data))


KINDS = ["none", "folder", "pipe", "link to nothing", "link to itself", "endless"]
"""Objects in place of a file; "endless" is a link to /dev/zero."""
kinds = st.sampled_from(["file"] * 10 + KINDS)


def place(path, kind, content):
    """Make a file, or an object of one of KINDS, at a path, in place of the present one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    links = {"link to nothing": "nothing", "link to itself": path.name, "endless": "/dev/zero"}
    if kind == "file":
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in links:
        path.symlink_to(links[kind])


def fuzz(strategy, case):
    """Call ``case`` with at least CASES values of a strategy, the same in every run."""
    count = 0

    @settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(value):
        nonlocal count
        count += 1
        case(value)

    run()
    assert count >= CASES
    print(f"{count} cases")


class HangError(BaseException):
    """End of a case that computes or waits too long. No ``except Exception`` catches it."""


_watched: list[Path] = []  # the folder that may be written, while a case runs
_outside: list[str] = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
CHANGES["sqlite3.connect"] = 1
"""Audit events that change files, with the number of their arguments that are paths."""


def _audit(event, arguments):
    if not _watched or event not in {"open", *CHANGES}:
        return
    if event == "open" and not arguments[2] & WRITING:
        return
    for path in arguments[: CHANGES.get(event, 1)]:
        if isinstance(path, int) or os.fspath(path) in (os.devnull, ":memory:"):
            continue
        parent, name = os.path.split(os.path.abspath(os.fsdecode(path).removeprefix("file:")))
        if not Path(os.path.realpath(parent), name).is_relative_to(_watched[0]):
            _outside.append(f"{event} {path!r}")
            raise PermissionError(errno.EPERM, "a fuzzed input must not write here", str(path))


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(folder):
    """Fail if the block takes too long, needs much memory, or writes outside ``folder``."""

    def expire(*_):
        raise HangError(f"longer than {CPU_SECONDS} s of computing, or {WALL_SECONDS} s in all")

    handlers = {signum: signal.signal(signum, expire) for signum in (signal.SIGPROF, signal.SIGALRM)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    _watched.append(Path(os.path.realpath(folder)))
    try:
        yield
    finally:
        _watched.clear()
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        outside = _outside[:]
        _outside.clear()
    assert not outside


def enter_workspace(monkeypatch, folder):
    """Make an empty folder the current directory, with the user's home folder and temporary files inside."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DAGSHUB_", "DVC_", "MINIGPT_")):
            monkeypatch.delenv(name)
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)


def run_program(main, folder):
    """Call ``main`` as a program does, under guard. Return its exit code and its messages.

    Any exception other than one that the program reports in one line fails the test.
    """
    code, out, err = 0, io.StringIO(), io.StringIO()
    with guarded(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.report(main)
        except SystemExit as end:
            code = end.code or 0
    message = err.getvalue()
    assert code in (0, 1)
    assert "Traceback" not in message
    assert "not enough memory" not in message, message
    assert not code or message.startswith("minigpt: "), message
    return code, message
