import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt import corpus
from minigpt.corpus import Split, encode, load, read_text, shuffled
from minigpt.errors import UserError


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def chunk(request, monkeypatch):
    """Chunks so small that everything is cut somewhere."""
    monkeypatch.setattr(corpus, "CHUNK", request.param)


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
    assert "".join(read_text(tmp_path / "a.txt")) == text


def test_a_folder_is_read_in_order_of_names_each_file_on_a_new_line(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "no"), ("d.txt", ""), ("e.txt", "third\n")):
        (tmp_path / name).write_text(text)
    assert "".join(read_text(tmp_path)) == "first\nsecond\nthird\n"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"abc\xff\xfe", "not UTF-8 at byte 3 .0xff"),
        ("é".encode() * 5 + b"\xc3", "not UTF-8 at byte 10 .0xc3"),
        (b"abcdef\0", "NUL at byte 6"),
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
            list(read_text(source))


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


def test_damaged_tokens_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    encode(tmp_path / "a.txt", 0.1, tmp_path)
    whole = (tmp_path / "val.npy").read_bytes()
    (tmp_path / "val.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"val\.npy: damaged"):
        load(tmp_path)


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
        for part in split.sweep(block_size, stride, share=(rank, world)):
            assert torch.equal(part.targets, part.ids + 1)
            scored += part.targets[:, part.skip :].flatten().tolist()
    assert sorted(scored) == list(range(1, length))


def test_a_sampled_sweep_is_spread_over_the_split():
    split = Split(torch.from_numpy(np.arange(30_000).astype(np.int16)))
    starts = [int(row[0]) for part in split.sweep(10, 10, max_chars=1000) for row in part.ids]
    assert len(starts) == 100
    assert (min(starts), max(starts)) == (0, 29_990)
    assert max(np.diff(starts)) <= 310


@given(st.text("e\u0301\u0323क़क\u093cé한ㅏ\u1100\u1161\u11a8 \nx", max_size=60), st.integers(1, 7))
def test_a_text_in_chunks_is_normalized_as_a_whole(text, size):
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(corpus.normalized(iter(chunks))) == unicodedata.normalize("NFC", text)


def test_the_normal_form_is_recorded(tmp_path):
    (tmp_path / "a.txt").write_text("cafe\u0301 क\u093c\n" * 40, encoding="utf-8")
    plain, _, _ = encode(tmp_path / "a.txt", 0.1, tmp_path)
    composed, n_train, n_val = encode(tmp_path / "a.txt", 0.1, tmp_path, "NFC")
    assert "é" not in plain.characters
    assert "é" in composed.characters
    assert "\u0301" not in composed.characters
    assert n_train + n_val == 40 * len(unicodedata.normalize("NFC", "cafe\u0301 क\u093c\n"))
    assert load(tmp_path).tokenizer.normalize == "NFC"
