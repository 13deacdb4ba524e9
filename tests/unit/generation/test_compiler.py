"""The compiled file of the decoder, and its cache."""

import _ctypes
import shutil
from pathlib import Path

import pytest
from helpers.models import build
from helpers.workspace import ROOT, python

from minigpt import export
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import compiler, native
from minigpt.generation.native import NativeGPT, compile_model

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def write_compiler(folder, script):
    """Write a program whose last argument but one is the file to write, as for a compiler; return its path."""
    program = folder / "compiler"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture(scope="module")
def compiled():
    """A compiled library in the cache of the session."""
    return compiler.build_library()


@pytest.fixture
def library(compiled, tmp_path, monkeypatch):
    """A library in a cache of its own. The compiler there takes no time: it copies the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", write_compiler(tmp_path, f'cp {compiled} "${{@: -2:1}}"'))
    return compiler.build_library()


DAMAGE = {
    "cut": (".so", lambda content: content[: len(content) // 2]),
    "empty": (".so", lambda content: b""),
    "another library": (".so", lambda content: Path(_ctypes.__file__).read_bytes()),
    "one byte": (".so", lambda content: content[:-1] + b"!"),
    "empty digest": (".sha256", lambda content: b""),
    "binary digest": (".sha256", lambda content: b"\xff" + content),
}


def spoil(library, damage):
    """Replace a file, because this process has mapped the library: it would end if that was truncated."""
    suffix, change = DAMAGE[damage]
    spoiled = library.with_name("spoiled")
    spoiled.write_bytes(change(library.with_suffix(suffix).read_bytes()))
    spoiled.replace(library.with_suffix(suffix))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_library_is_built_again(library, damage):
    spoil(library, damage)
    assert not compiler.is_intact(library)
    assert type(compile_model(build().eval(), "int8", "always")) is NativeGPT
    assert compiler.is_intact(library)


@pytest.mark.parametrize("name", ["native.so", "native.sha256", "native.lock", "cache"])
def test_cache_that_cannot_be_used_leaves_the_text_to_pytorch(library, name, capsys):
    if name == "cache":
        shutil.rmtree(library.parent)
        library.parent.write_text("a file")
    else:
        path = library.with_suffix(Path(name).suffix)
        path.unlink(missing_ok=True)
        path.mkdir()
        library.with_suffix(".sha256" if name == "native.lock" else ".lock").unlink(missing_ok=True)
    native._report_once.cache_clear()
    assert compile_model(build().eval(), "int8", "auto", native.PAYS_FROM) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minigpt: no compiled decoder: ")


@pytest.mark.parametrize(
    "script, reason",
    [
        ("exit 0", "not the compiled decoder"),
        ('echo no library > "${@: -2:1}"', "not the compiled decoder"),
        (f'cp {_ctypes.__file__} "${{@: -2:1}}"', "not the compiled decoder"),
        ("echo '\xff' >&2; exit 1", "fails: "),
        ("exec sleep 60", "takes longer than 1 s"),
    ],
)
def test_compiler_that_writes_no_library_is_named(tmp_path, monkeypatch, script, reason):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", write_compiler(tmp_path, script))
    monkeypatch.setattr(compiler, "LONGEST_BUILD", 1)
    with pytest.raises(compiler.NotCompiledError, match=reason):
        compiler.build_library()
    assert not list(tmp_path.rglob("native*.so"))


@pytest.mark.slow
def test_command_writes_with_a_truncated_library(compiled, tmp_path):
    model = build()
    export.export(tmp_path / "gpt", model.config, model.state_dict(), Tokenizer("\nabcdefghij"))
    shutil.copytree(compiled.parent, tmp_path / "minigpt")
    cached = tmp_path / "minigpt" / compiled.name
    spoil(cached, "cut")
    for mode in ("auto", "always", "auto"):  # the first one compiles in the background
        arguments = ("write", "ab", "--model", tmp_path / "gpt", "--seed", "5", "--compile", mode)
        ran = python("-m", "minigpt", *arguments, cwd=ROOT, XDG_CACHE_HOME=str(tmp_path))
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith("ab")
    assert compiler.is_intact(cached)
