import json
import os
import signal
import subprocess
import sys
import threading
import time
import unicodedata

import numpy as np
import psutil
import pytest
import torch
from helpers.workspace import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import dataset
from minigpt.data import encode as encode_module
from minigpt.data import text as text_module
from minigpt.data.dataset import Split, load, shuffled
from minigpt.data.encode import SPLITS, encode
from minigpt.data.text import pieces, read, text_files
from minigpt.errors import UserError


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def chunk(request, monkeypatch):
    """Chunks and pieces so small that everything is cut somewhere."""
    monkeypatch.setattr(text_module, "CHUNK", request.param)
    monkeypatch.setattr(text_module, "PIECE", 2 * request.param)


def text_of(source, normalize="none"):
    """What is encoded of ``source``, put together from its pieces."""
    chunks = [points for piece in pieces(text_files(source), normalize) for points in read(piece, normalize)]
    return "".join(points.astype("<u4").tobytes().decode("utf-32-le") for points in chunks)


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in (*SPLITS, "tokenizer.json", "digest.json")}


@pytest.mark.parametrize(
    "data, text",
    [
        ("नमस्ते".encode(), "नमस्ते"),
        (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n"),
        ("𝄞é\r".encode(), "𝄞é\n"),
    ],
)
def test_text_is_read_whole_however_it_is_cut(tmp_path, chunk, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert text_of(tmp_path / "a.txt") == text


def test_a_folder_is_read_in_order_of_names_each_file_on_a_new_line(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "no"), ("d.txt", ""), ("e.txt", "third\n")):
        (tmp_path / name).write_text(text)
    assert text_of(tmp_path) == "first\nsecond\nthird\n"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"abc\xff\xfe", "not UTF-8 at byte 3 .0xff"),
        ("é".encode() * 5 + b"\xc3", "not UTF-8 at byte 10 .0xc3"),
        (b"abcdef\0", "NUL at byte 6"),
        (b"abcd\0\xff", "NUL at byte 4"),
        (b"abcd\xff\0", "not UTF-8 at byte 4"),
        (b"abc\r\n" * 4 + b"\x80" * 9, "not UTF-8 at byte 20 .0x80"),
        (b"\xef\xbb\xbfab\xe0\xa4\r\n\xff", "not UTF-8 at byte 5 .0xe0"),
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"abc", "too few"),
    ],
)
def test_bad_bytes_are_named_with_their_offset(tmp_path, chunk, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        encode(tmp_path / "a.txt", 0.1, tmp_path)


def test_missing_sources_are_named(tmp_path):
    for source in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=r"no (such file|\.txt file)"):
            text_files(source)


def test_encoding_is_what_plain_python_makes_of_the_text(tmp_path, chunk):
    text = "to be or not\nनमस्ते to be" * 9
    (tmp_path / "a.txt").write_text(text)
    tokenizer, n_train, n_val = encode(tmp_path / "a.txt", 0.1, tmp_path)
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    expected = [ids[character] for character in text]
    loaded = load(tmp_path)
    assert n_train == int(len(text) * 0.9)
    assert n_train + n_val == len(text)
    assert loaded.train.tokens.tolist() + loaded.val.tokens.tolist() == expected
    assert loaded.tokenizer.characters == tokenizer.characters == "".join(sorted(ids))


def damage(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, change",
    [
        ("val.npy", lambda data: data.pop()),
        ("val.npy", lambda data: data.append(0)),
        ("train.npy", lambda data: data.__setitem__(-5, data[-5] ^ 1)),
        ("digest.json", lambda data: data.__delitem__(slice(-9, None))),
        ("digest.json", lambda data: data.__setitem__(slice(None), b"{}")),
    ],
)
def test_damaged_tokens_are_refused(tmp_path, name, change):
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    encode(tmp_path / "a.txt", 0.1, tmp_path)
    assert load(tmp_path).digest == json.loads((tmp_path / "digest.json").read_text())["sha256"]
    damage(tmp_path / name, change)
    with pytest.raises(UserError, match=r"(val\.npy|digest\.json): damaged: .*`dvc repro --force prepare`"):
        load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    encode(tmp_path / "a.txt", 0.1, tmp_path)
    for name in ("train.npy", "digest.json"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{name}: no such file"):
            load(tmp_path)
        (tmp_path / name).write_bytes(kept)


TEXTS = st.lists(
    st.text("ab \n\r\u0301\u0323é\ufeff\u0928\u092e\u093c한\u1100\u1161\U0001d11e", max_size=40), max_size=6
)


@given(texts=TEXTS, size=st.integers(1, 40), normalize=st.sampled_from(["none", "NFC"]), mark=st.booleans())
def test_pieces_are_what_the_whole_texts_are(tmp_path_factory, texts, size, normalize, mark):
    folder = tmp_path_factory.mktemp("texts")
    expected = ""
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
        plain = (text if mark else text.removeprefix("\ufeff")).replace("\r\n", "\n").replace("\r", "\n")
        expected += ("\n" if plain and expected and expected[-1] != "\n" else "") + plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK", max(1, size // 3))
        patch.setattr(text_module, "PIECE", size)
        found = text_of(folder, normalize) if texts else ""
    assert found == (unicodedata.normalize("NFC", expected) if normalize == "NFC" else expected)


PAGE = "It is a truth, universally\r\nacknowledged\rthat नमस्ते e\u0301 क\u093c ".encode() * 3000


@pytest.mark.parametrize("normalize", ["none", "NFC"])
def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch, normalize):
    monkeypatch.setattr(text_module, "PIECE", 1 << 20)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"\xef\xbb\xbf" + PAGE)
    (texts / "b.txt").write_bytes(b"")
    (texts / "c.txt").write_bytes(PAGE * 9 + "𝄞".encode() + PAGE * 9)  # a character of one piece alone
    (texts / "d.txt").write_bytes(PAGE)
    found = []
    for workers in (1, 2, 3):
        (tmp_path / str(workers)).mkdir()
        encode(texts, 0.1, tmp_path / str(workers), normalize, workers)
        found.append(files_of(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    assert load(tmp_path / "1").tokenizer.decode(load(tmp_path / "1").train.tokens.numpy()[:9]) == "It is a t"


BAD = st.tuples(st.integers(1000, 3_000_000), st.sampled_from([b"\xff", b"\0", b"\xe0\xa4"]))


@settings(max_examples=5, deadline=None)
@given(spots=st.lists(BAD, min_size=1))
def test_the_first_bad_byte_is_named_by_any_number_of_processes(tmp_path_factory, spots):
    folder = tmp_path_factory.mktemp("bad")
    text = bytearray(b"to be or not to be\n" * 170_000)
    for place, bad in spots:
        text[place : place + len(bad)] = bad
    (folder / "a.txt").write_bytes(text)
    messages = []
    for workers in (1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as raised:
            patch.setattr(text_module, "PIECE", 1 << 19)
            encode(folder, 0.1, folder, workers=workers)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert f"at byte {min(place for place, _ in spots)}" in messages[0]


def test_a_text_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 100)
    survey = encode_module._scan

    def changing(*arguments):
        found = survey(*arguments)
        with (tmp_path / "a.txt").open("a") as file:
            file.write("more")
        return found

    monkeypatch.setattr(encode_module, "_scan", changing)
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        encode(tmp_path / "a.txt", 0.1, tmp_path)


PREPARE = """
import sys
from pathlib import Path
from minigpt import errors
from minigpt.data import dataset, text as text_module
from minigpt.data import encode as encode_module
from minigpt.files import atomic_directory

def main():
    with atomic_directory(Path(sys.argv[2])) as folder:
        encode.encode(Path(sys.argv[1]), 0.1, folder, workers=2)

if __name__ == "__main__":
    errors.run(main)
"""


@pytest.mark.parametrize(
    "victim, signum, ended",
    [
        ("all", signal.SIGINT, (130, "minigpt: interrupted\n")),
        ("worker", signal.SIGKILL, (1, "process that encoded it was killed")),
        ("parent", signal.SIGKILL, (-signal.SIGKILL, None)),
        ("parent", signal.SIGTERM, (-signal.SIGTERM, None)),
    ],
)
def test_no_process_outlives_the_encoding(tmp_path, victim, signum, ended):
    code, said = ended
    (tmp_path / "prepare.py").write_text(PREPARE)
    (tmp_path / "texts").mkdir()
    (tmp_path / "page").write_bytes(PAGE * 200)
    for number in range(20):  # it would take several seconds
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
    if victim == "all":  # as a terminal sends it, to workers that have only begun, too
        os.killpg(running.pid, signum)
    else:
        (parent if victim == "parent" else workers[0]).send_signal(signum)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == code, error
    if said:
        assert error.count("\n") == 1 and said in error, error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "prepare.py", "texts"]
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_a_batch_depends_on_its_arguments_alone():
    split = Split(torch.arange(1000, dtype=torch.int16))
    ids, targets = split.batch(seed=3, first=20, batch_size=4, block_size=8)
    assert ids.shape == targets.shape == (4, 8)
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids, split.batch(3, 20, 4, 8)[0])
    assert torch.equal(ids, split.batch(3, 10, 20, 8)[0][10:14])
    assert not torch.equal(ids, split.batch(4, 20, 4, 8)[0])


@pytest.mark.parametrize("length", [9, 12, 16, 17, 40, 1000])
def test_every_epoch_reads_each_window_once_and_all_epochs_everything(length):
    split = Split(torch.arange(length, dtype=torch.int16))
    per_epoch = max(1, (length - 8) // 8)
    read, orders = np.zeros(length, dtype=int), set()
    for epoch in range(200):
        ids, targets = split.batch(0, epoch * per_epoch, per_epoch, 8)
        assert len(set(targets.flatten().tolist())) == per_epoch * 8
        read += np.bincount(targets.flatten(), minlength=length)
        orders.add(tuple((ids[:, 0] - ids[:, 0].min()).tolist()))
    assert read[0] == 0
    assert (read[1:] > 0).all()
    assert len(orders) == 1 if per_epoch == 1 else len(orders) > min(150, per_epoch - 1)


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 5000])
def test_shuffled_is_a_permutation(n):
    places = np.arange(n, dtype=np.uint64)
    assert sorted(shuffled(places, n, np.full(n, 7, dtype=np.uint64))) == list(range(n))


def test_each_place_goes_everywhere_equally_often():
    n, keys = 6, np.arange(12_000, dtype=np.uint64)
    pairs = [shuffled(np.full(len(keys), place, dtype=np.uint64), n, keys) for place in range(n)]
    for went in pairs:
        assert abs(np.bincount(went.astype(int), minlength=n) / len(keys) - 1 / n).max() < 0.02
    # Two places together: each of the n (n - 1) ways.
    together = np.bincount((pairs[0] * np.uint64(n) + pairs[1]).astype(int), minlength=n * n) / len(keys)
    assert abs(together[together > 0] - 1 / (n * (n - 1))).max() < 0.01


@pytest.mark.parametrize("length", [2, 5, 9, 10, 17, 100])
@pytest.mark.parametrize("block_size, stride", [(8, 8), (8, 4), (8, 1), (8, 3), (64, 32)])
@pytest.mark.parametrize("world", [1, 3])
def test_a_sweep_scores_every_target_once(length, block_size, stride, world):
    split = Split(torch.arange(length, dtype=torch.uint8))
    scored = []
    for rank in range(world):
        for part in split.eval_batches(block_size, stride, share=(rank, world)):
            assert torch.equal(part.targets, part.ids + 1)
            scored += part.targets[:, part.already_scored :].flatten().tolist()
    assert sorted(scored) == list(range(1, length))


def test_a_sampled_sweep_is_spread_over_the_split():
    split = Split(torch.from_numpy(np.arange(30_000).astype(np.int16)))
    starts = [int(row[0]) for part in split.eval_batches(10, 10, max_chars=1000) for row in part.ids]
    assert len(starts) == 100
    assert (min(starts), max(starts)) == (0, 29_990)
    assert max(np.diff(starts)) <= 310


def test_the_normal_form_is_recorded(tmp_path):
    (tmp_path / "a.txt").write_text("cafe\u0301 क\u093c\n" * 40, encoding="utf-8")
    plain, _, _ = encode(tmp_path / "a.txt", 0.1, tmp_path)
    composed, n_train, n_val = encode(tmp_path / "a.txt", 0.1, tmp_path, "NFC")
    assert "é" not in plain.characters
    assert "é" in composed.characters
    assert "\u0301" not in composed.characters
    assert n_train + n_val == 40 * len(unicodedata.normalize("NFC", "cafe\u0301 क\u093c\n"))
    assert load(tmp_path).tokenizer.normalize == "NFC"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A corpus in memory, and the same one read from its files."""
    (tmp_path / "a.txt").write_text("to be or not नमस्ते to be\n" * 200)
    encode(tmp_path / "a.txt", 0.1, tmp_path)
    whole = load(tmp_path)
    monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    return whole, load(tmp_path), tmp_path


def test_batches_from_a_file_are_those_from_memory_in_any_order(stored):
    whole, read_from, _ = stored
    for first, ahead in ((0, 4), (4, 4), (4, 4), (8, 4), (100, 8), (104, 0), (108, 4), (112, 4), (40, 4)):
        for one, other in zip(
            whole.train.batch(3, first, 4, 8), read_from.train.batch(3, first, 4, 8, ahead), strict=True
        ):
            assert torch.equal(one, other)
    for one, other in zip(whole.val.eval_batches(8, 4), read_from.val.eval_batches(8, 4), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.targets, other.targets)


def test_what_is_read_ahead_fails_when_it_is_asked_for(stored):
    _, read_from, folder = stored
    size = (folder / "train.npy").stat().st_size
    os.truncate(folder / "train.npy", 150)
    with pytest.raises(UserError, match=r"train\.npy: has become shorter"):
        read_from.train.batch(3, 0, 4, 8, prefetch_stride=4)
    os.truncate(folder / "train.npy", size)
    read_from.train.batch(3, 0, 4, 8, prefetch_stride=4)
    os.truncate(folder / "train.npy", 150)
    for first in (4, 8):
        try:
            read_from.train.batch(3, first, 4, 8, prefetch_stride=4)
        except UserError:
            break
    else:
        pytest.fail("a batch was made of nothing")


def test_no_thread_outlives_what_it_reads(stored):
    _, read_from, _ = stored
    before = threading.active_count()
    for first in range(0, 400, 4):
        read_from.train.batch(3, first, 4, 8, prefetch_stride=4)
    read_from.train._ahead[1].result()
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join(1)
    assert threading.active_count() <= before
