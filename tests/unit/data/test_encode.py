import os
import signal
import subprocess
import sys
import time
import unicodedata

import psutil
import pytest
from helpers.workspace import FULL, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import encode as encode_module
from minigpt.data import text as text_module
from minigpt.data.dataset import load_corpus
from minigpt.data.encode import SPLITS, TEST, encode_corpus
from minigpt.errors import UserError

PARAGRAPHS = "It is a truth, universally\r\nacknowledged\rthat नमस्ते e\u0301 क\u093c ".encode() * 3000


def read_outputs(folder):
    names = {*SPLITS, "tokenizer.json", "digest.json"}
    assert names <= {path.name for path in folder.iterdir()}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ids_are_indices_into_the_sorted_characters(tmp_path, small_chunks):
    text = "to be or not\nनमस्ते to be" * 9
    (tmp_path / "a.txt").write_text(text)
    tokenizer, sizes = encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    loaded = load_corpus(tmp_path)
    assert sizes == {"train": int(len(text) * 0.9), "val": len(text) - int(len(text) * 0.9)}
    assert loaded.train.tokens.tolist() + loaded.val.tokens.tolist() == [ids[character] for character in text]
    assert loaded.tokenizer.characters == tokenizer.characters == "".join(sorted(ids))


def test_normal_form_is_saved_with_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("cafe\u0301 क\u093c\n" * 40, encoding="utf-8")
    plain, _ = encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)
    composed, sizes = encode_corpus(tmp_path / "a.txt", 0.1, tmp_path, "NFC")
    assert "é" not in plain.characters
    assert "é" in composed.characters
    assert "\u0301" not in composed.characters
    assert sum(sizes.values()) == 40 * len(unicodedata.normalize("NFC", "cafe\u0301 क\u093c\n"))
    assert load_corpus(tmp_path).tokenizer.normalize == "NFC"


@pytest.mark.parametrize("data, message", [(b"", "empty"), (b"\xef\xbb\xbf", "empty"), (b"abc", "too few")])
def test_text_too_short_to_split_is_rejected(tmp_path, small_chunks, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        encode_corpus(tmp_path / "a.txt", 0.1, tmp_path)


@pytest.mark.parametrize("normalize, options", [("none", {}), ("NFC", {"test_fraction": 0.1, "split": "each_file"})])
def test_number_of_processes_does_not_change_the_output(tmp_path, monkeypatch, normalize, options):
    monkeypatch.setattr(text_module, "PIECE_BYTES", 1 << 20)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"\xef\xbb\xbf" + PARAGRAPHS)
    (texts / "b.txt").write_bytes(b"")
    # Only one piece has this character.
    (texts / "c.txt").write_bytes(PARAGRAPHS * 9 + "𝄞".encode() + PARAGRAPHS * 9)
    (texts / "d.txt").write_bytes(PARAGRAPHS)
    found = []
    for workers in (1, 2, 3):
        if workers == 3:
            monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
        (tmp_path / str(workers)).mkdir()
        encode_corpus(texts, 0.1, tmp_path / str(workers), normalize, workers, **options)
        found.append(read_outputs(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    assert (TEST in found[0]) == bool(options)
    corpus = load_corpus(tmp_path / "1")
    assert corpus.tokenizer.decode(corpus.train.tokens.numpy()[:9]) == "It is a t"


INVALID = st.tuples(st.integers(1000, 3_000_000), st.sampled_from([b"\xff", b"\0", b"\xe0\xa4"]))


@settings(max_examples=5, deadline=None)
@given(spots=st.lists(INVALID, min_size=1))
def test_any_number_of_processes_reports_the_first_invalid_byte(tmp_path_factory, spots):
    folder = tmp_path_factory.mktemp("invalid")
    text = bytearray(b"to be or not to be\n" * 170_000)
    for offset, data in spots:
        text[offset : offset + len(data)] = data
    (folder / "a.txt").write_bytes(text)
    messages = []
    for workers in (1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as raised:
            patch.setattr(text_module, "PIECE_BYTES", 1 << 19)
            encode_corpus(folder, 0.1, folder, workers=workers)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert f"at byte {min(offset for offset, _ in spots)}" in messages[0]


@pytest.mark.parametrize("changed", ["to be\n" * 400, "é" * 950], ids=["longer", "same size"])
def test_text_that_changes_during_encoding_is_rejected(tmp_path, monkeypatch, changed):
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be\n" * 100)
    scan = encode_module._scan

    def scan_and_change(*arguments):
        result = scan(*arguments)
        path.write_text(changed)
        return result

    monkeypatch.setattr(encode_module, "_scan", scan_and_change)
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        encode_corpus(path, 0.1, tmp_path)


PREPARE = """
import sys
from pathlib import Path
from minigpt import program
from minigpt.data.encode import encode_corpus
from minigpt.files import atomic_directory

def main():
    with atomic_directory(Path(sys.argv[2])) as folder:
        encode_corpus(Path(sys.argv[1]), 0.1, folder, workers=2)

if __name__ == "__main__":
    program.run(main)
"""


@pytest.mark.parametrize(
    "target, signum, ended",
    [
        ("all", signal.SIGINT, (130, "minigpt: interrupted\n")),
        ("worker", signal.SIGKILL, (1, "an encoding process was killed")),
        ("parent", signal.SIGKILL, (-signal.SIGKILL, None)),
        *([("parent", signal.SIGTERM, (-signal.SIGTERM, None))] if FULL else []),
    ],
)
def test_no_process_outlives_an_interrupted_encoding(tmp_path, target, signum, ended):
    code, message = ended
    (tmp_path / "prepare.py").write_text(PREPARE)
    (tmp_path / "texts").mkdir()
    (tmp_path / "page").write_bytes(PARAGRAPHS * 200)
    for number in range(20):  # enough for several seconds
        (tmp_path / "texts" / f"{number}.txt").symlink_to(tmp_path / "page")
    running = subprocess.Popen(
        [sys.executable, tmp_path / "prepare.py", tmp_path / "texts", tmp_path / "prepared"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    parent, workers = psutil.Process(running.pid), []
    while running.poll() is None and len(workers) < 2:
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.05)
    if target == "all":  # like Ctrl-C in a terminal, which also reaches workers that are still starting
        os.killpg(running.pid, signum)
    else:
        (parent if target == "parent" else workers[0]).send_signal(signum)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == code, error
    if message:
        assert error.count("\n") == 1 and message in error, error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "prepare.py", "texts"]
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
