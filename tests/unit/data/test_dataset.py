import gc
import json
import os
import threading

import numpy as np
import pytest
import torch

from minigpt.data import dataset
from minigpt.data.dataset import Split, load_corpus, permute
from minigpt.data.encode import encode_corpus
from minigpt.errors import UserError


def prepare(folder, text):
    (folder / "a.txt").write_text(text)
    encode_corpus(folder / "a.txt", 0.1, folder)


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 5000])
def test_permute_is_a_permutation(n):
    positions = np.arange(n, dtype=np.uint64)
    assert sorted(permute(positions, n, np.full(n, 7, dtype=np.uint64))) == list(range(n))


def test_permute_is_uniform_over_keys():
    n, keys = 6, np.arange(12_000, dtype=np.uint64)
    images = [permute(np.full(len(keys), position, dtype=np.uint64), n, keys) for position in range(n)]
    for image in images:
        assert abs(np.bincount(image.astype(int), minlength=n) / len(keys) - 1 / n).max() < 0.02
    # Two positions jointly: each of the n (n - 1) ordered pairs.
    pairs = np.bincount((images[0] * np.uint64(n) + images[1]).astype(int), minlength=n * n) / len(keys)
    assert abs(pairs[pairs > 0] - 1 / (n * (n - 1))).max() < 0.01


def test_batch_depends_only_on_its_arguments():
    split = Split(torch.arange(1000, dtype=torch.int16))
    ids, targets = split.batch(seed=3, first=20, batch_size=4, block_size=8)
    assert ids.shape == targets.shape == (4, 8)
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids, split.batch(3, 20, 4, 8)[0])
    assert torch.equal(ids, split.batch(3, 10, 20, 8)[0][10:14])
    assert not torch.equal(ids, split.batch(4, 20, 4, 8)[0])


@pytest.mark.parametrize("length", [9, 12, 16, 17, 40, 1000])
def test_epoch_reads_each_window_once_and_all_epochs_cover_the_split(length):
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


@pytest.mark.parametrize("length", [2, 5, 9, 10, 17, 100])
@pytest.mark.parametrize("block_size, stride", [(8, 8), (8, 4), (8, 1), (8, 3), (64, 32)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_eval_batches_score_every_target_once(length, block_size, stride, world_size):
    split = Split(torch.arange(length, dtype=torch.uint8))
    scored = []
    for rank in range(world_size):
        for batch in split.eval_batches(block_size, stride, shard=(rank, world_size)):
            assert torch.equal(batch.targets, batch.ids + 1)
            scored += batch.targets[:, batch.already_scored :].flatten().tolist()
    assert sorted(scored) == list(range(1, length))


def test_max_chars_selects_evenly_spaced_windows():
    split = Split(torch.from_numpy(np.arange(30_000).astype(np.int16)))
    starts = [int(row[0]) for batch in split.eval_batches(10, 10, max_chars=1000) for row in batch.ids]
    assert len(starts) == 100
    assert (min(starts), max(starts)) == (0, 29_990)
    assert max(np.diff(starts)) <= 310


@pytest.mark.parametrize(
    "name, damage",
    [
        ("val.npy", lambda data: data.pop()),
        ("val.npy", lambda data: data.append(0)),
        ("train.npy", lambda data: data.__setitem__(-5, data[-5] ^ 1)),
        ("digest.json", lambda data: data.__delitem__(slice(-9, None))),
        ("digest.json", lambda data: data.__setitem__(slice(None), b"{}")),
    ],
)
def test_damaged_corpus_is_rejected(tmp_path, name, damage):
    prepare(tmp_path, "abcdefgh" * 20)
    assert load_corpus(tmp_path).digest == json.loads((tmp_path / "digest.json").read_text())["sha256"]
    data = bytearray((tmp_path / name).read_bytes())
    damage(data)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"(val\.npy|digest\.json): damaged: .*`dvc repro --force prepare`"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("name", ["train.npy", "digest.json", "tokenizer.json"])
def test_missing_file_is_reported(tmp_path, name):
    prepare(tmp_path, "abcdefgh" * 20)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_corpus(tmp_path)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Return a corpus that is mapped to memory, the same one read from its files, and their folder."""
    prepare(tmp_path, "to be or not नमस्ते to be\n" * 200)
    mapped = load_corpus(tmp_path)
    monkeypatch.setattr(dataset, "MAX_IN_MEMORY_BYTES", 0)
    return mapped, load_corpus(tmp_path), tmp_path


def assert_equal_batches(one, other):
    for first, stride in ((0, 4), (4, 4), (4, 4), (8, 4), (100, 8), (104, 0), (108, 4), (112, 4), (40, 4)):
        pairs = zip(one.train.batch(3, first, 4, 8), other.train.batch(3, first, 4, 8, stride), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for a, b in zip(one.val.eval_batches(8, 4), other.val.eval_batches(8, 4), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.targets, b.targets)


def test_batches_from_file_equal_batches_from_memory_in_any_order(corpora):
    mapped, from_file, _ = corpora
    assert_equal_batches(mapped, from_file)


def test_batches_without_preadv_are_equal(corpora, monkeypatch):
    mapped, _, folder = corpora
    monkeypatch.delattr(os, "preadv")  # as on Windows
    assert_equal_batches(mapped, load_corpus(folder))


def test_file_that_became_shorter_is_reported_by_the_next_batches(corpora):
    _, from_file, folder = corpora
    size = (folder / "train.npy").stat().st_size
    os.truncate(folder / "train.npy", 150)
    with pytest.raises(UserError, match=r"train\.npy: became shorter"):
        from_file.train.batch(3, 0, 4, 8, prefetch_stride=4)
    os.truncate(folder / "train.npy", size)
    from_file.train.batch(3, 0, 4, 8, prefetch_stride=4)
    os.truncate(folder / "train.npy", 150)
    with pytest.raises(UserError, match=r"train\.npy: became shorter"):
        for first in (4, 8):  # the batch at 4 may have been prefetched before the file became shorter
            from_file.train.batch(3, first, 4, 8, prefetch_stride=4)


def test_prefetching_uses_one_thread_that_ends_with_the_split(corpora):
    _, from_file, folder = corpora
    split = Split(from_file.train.tokens, folder / "train.npy")
    before = set(threading.enumerate())
    for first in range(0, 400, 4):
        split.batch(3, first, 4, 8, prefetch_stride=4)
    (thread,) = set(threading.enumerate()) - before
    del split
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
