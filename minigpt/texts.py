"""Texts that git does not have: fetched from a DVC remote, or from the address of their publisher.

python -m minigpt.texts data/shakespeare.txt

``data/shakespeare.txt.yaml`` describes such a text. It is copied to ``data/shakespeare.txt.dvc`` when the text is
fetched, not before: a .dvc file without its text would make ``dvc checkout`` and ``dvc exp apply`` fail.
"""

import hashlib
import http.client
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import yaml

from minigpt import errors, program
from minigpt.files import write_atomically

TIMEOUT = 30  # seconds without data after which a download counts as failed
DVC = (sys.executable, "-m", "dvc")


def fetch(text: Path) -> None:
    """Write a text that is missing, and its .dvc file, if ``<text>.yaml`` or ``<text>.dvc`` names its digest.

    Its first source is DVC's cache or remote, the second the address in ``meta.url`` of that file. Raise UserError if
    neither has the text with that digest. A text that was saved by hand gets the .dvc file of its digest.
    """
    description, record = Path(f"{text}.yaml"), Path(f"{text}.dvc")
    created = description.is_file() and not record.is_file()
    if text.exists() and not (created and _has_digest(text, description)):
        return
    if not (created or record.is_file()):
        return
    if created:
        write_atomically(record, description.read_bytes())
    try:
        if not text.exists():
            _fetch(text, record)
        # Into DVC's cache: `dvc push` uploads it, and queued experiments find it. Without DVC, the text is usable, too.
        subprocess.run([*DVC, "commit", "--quiet", "--force", str(record)], check=False, capture_output=True)
    except BaseException:
        if created:
            record.unlink()
        raise
    if created:  # the next commit has it, and so do the experiments after it
        subprocess.run(["git", "add", "--", str(record)], check=False, capture_output=True)


def _has_digest(text: Path, description: Path) -> bool:
    """Return whether a text is a file with the digest in a description. A damaged description has none."""
    with suppress(errors.UserError):
        return text.is_file() and _described(description)[0] == _digest(text.read_bytes())
    return False


def _described(record: Path) -> tuple[str, str]:
    """Return the digest and the address in a .dvc file or a description."""
    try:
        tracked = yaml.safe_load(record.read_text(encoding="utf-8"))
        return tracked["outs"][0]["md5"], tracked.get("meta", {}).get("url", "")
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        raise errors.UserError(f"{record}: not a file of `dvc add`; {_ways_out(record.with_suffix(''))}") from None


def _fetch(text: Path, record: Path) -> None:
    """Write the text that the .dvc file ``record`` describes, or raise UserError if no source has it."""
    digest, url = _described(record)
    pulled = subprocess.run([*DVC, "pull", "--quiet", str(record)], check=False, capture_output=True)
    if pulled.returncode == 0 and (text.is_dir() or (text.is_file() and _digest(text.read_bytes()) == digest)):
        return
    try:
        data = _download(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = str(error).removeprefix("<urlopen error ").removesuffix(">")
        reason = f"DVC's remote does not have it, and {url or 'its address'} cannot be read ({cause})"
        raise errors.UserError(f"{text}: {reason}; {_ways_out(text)}") from None
    if _digest(data) != digest:
        reason = f"DVC's remote does not have it, and {url} has another text (MD5 {_digest(data)}, expected {digest})"
        raise errors.UserError(f"{text}: {reason}; {_ways_out(text)}")
    write_atomically(text, data)


def _ways_out(text: Path) -> str:
    return f"set a remote with `dvc remote add --local --default NAME URL`, or save the text as {text}"


def _download(url: str) -> bytes:
    if not url.startswith(("https://", "http://")):
        raise ValueError("not an address")
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310 - only HTTP
        return bytes(response.read())


def _digest(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def main() -> None:
    """Fetch the texts that the command line names."""
    for name in sys.argv[1:]:
        fetch(Path(name))


if __name__ == "__main__":
    program.run(main)
