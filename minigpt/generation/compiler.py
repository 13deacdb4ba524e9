"""Compilation of native.cpp for this processor, into a file in the user's cache folder that all models share."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.files import fsync
from minigpt.runtime.cpu import cpu_info
from minigpt.runtime.device import bfloat16_at_half_rate

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
LONGEST_BUILD = 120
"""Seconds after which a compiler, or another process that compiles, is not waited for."""


class NotCompiledError(Exception):
    """The compiled decoder is missing, or does not implement the model."""


def library_path() -> Path:
    """Return where the compiled file for this source, compiler flags and processor is, or will be."""
    features = cpu_info("flags", "Features")
    made_from = "\n".join((SOURCE.read_text(encoding="utf-8"), *compiler_flags(), platform.machine(), features))
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
    except RuntimeError:  # a container may run as a user without an entry in /etc/passwd
        raise NotCompiledError("this user has no home folder; set XDG_CACHE_HOME to a folder for it") from None
    return folder / f"native-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"


def is_intact(library: Path) -> bool:
    """Return whether the compiled file is as it was written. Loading a truncated one would end the process (SIGBUS)."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == _digest_path(library).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def compiler_flags() -> tuple[str, ...]:
    """Return the flags: without bfloat16 products where the processor has them at half the rate of float32."""
    return (*FLAGS, *(("-mno-avx512bf16",) if bfloat16_at_half_rate() else ()))


def find_compiler() -> str:
    """Return the path of the C++ compiler, g++ or the one that CXX names, or raise NotCompiledError."""
    name = os.environ.get("CXX") or "g++"
    if compiler := shutil.which(name):
        return compiler
    advice = "with one (for example `apt install g++`), text is written 3 to 4 times as fast"
    raise NotCompiledError(f"there is no C++ compiler {name}; {advice}")


def build_library(wait: bool = True) -> Path:
    """Compile native.cpp unless an intact file exists, in about ten seconds, and return the compiled file.

    Raises:
        NotCompiledError: it cannot be compiled, or another process is compiling it, unless ``wait``.
    """
    path = library_path()
    if is_intact(path):
        return path
    compiler = find_compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(path.with_suffix(".lock"), timeout=LONGEST_BUILD if wait else 0),
            tempfile.TemporaryDirectory(dir=path.parent) as temporary,
        ):
            if not is_intact(path):
                _install(_compile(compiler, Path(temporary) / path.name), path)
    except Timeout:
        raise NotCompiledError("another process is compiling it") from None
    except OSError as error:
        raise NotCompiledError(f"{error.filename}: {error.strerror}") from None
    return path


def _compile(compiler: str, target: Path) -> Path:
    """Compile native.cpp to ``target``, and check that it can be loaded."""
    command = [compiler, *compiler_flags(), "-o", str(target), str(SOURCE)]
    try:
        ran = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=LONGEST_BUILD,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotCompiledError(f"{compiler} takes longer than {LONGEST_BUILD} s") from None
    if ran.returncode:
        raise NotCompiledError(f"{compiler} fails: {(ran.stderr.splitlines() or ['no message'])[0]}")
    try:
        ctypes.CDLL(str(target))["forward_float32"]
    except (OSError, AttributeError):
        raise NotCompiledError(f"{compiler} writes a file that is not the compiled decoder") from None
    return target


def _install(compiled: Path, path: Path) -> None:
    """Move the compiled file to ``path``, after its digest, both on the disk before they get their names."""
    digest = compiled.with_suffix(".sha256")
    digest.write_text(hashlib.sha256(compiled.read_bytes()).hexdigest(), encoding="ascii")
    for source, target in ((digest, _digest_path(path)), (compiled, path)):
        fsync(source)
        source.replace(target)
    fsync(path.parent)


def build_in_background() -> None:
    """Start a process that compiles native.cpp, for the next text, and outlives this one."""
    find_compiler()
    package_root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    # Bound to one core and never spinning, these threads would compete with those that write now.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    try:
        subprocess.Popen(
            [sys.executable, "-m", "minigpt.generation.compiler"],
            env=environment | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise NotCompiledError(f"no process can be started: {error.strerror}") from None


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)
    build_library(wait=False)
