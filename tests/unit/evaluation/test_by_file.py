import numpy as np
import pytest

from minigpt.evaluation import paired
from minigpt.evaluation.by_file import FileRecorder
from minigpt.evaluation.character_losses import LossRecorder

FILES = [("a", 0, 1), ("b", 1, 2501), ("c", 2501, 2508), ("d", 2508, 4600)]
"""The first character of a split is never scored, so the file a has no loss."""


def recorded(nats, size):
    recorder = FileRecorder(FILES)
    for begin in range(0, len(nats), size):
        recorder.extend(nats[begin : begin + size])
    return recorder.rows("val")


def test_each_file_has_the_loss_of_its_own_characters():
    nats = np.random.default_rng(0).exponential(1.5, 4599)
    rows = recorded(nats, 100)
    assert [(row["file"], row["split"], row["characters"]) for row in rows] == [
        ("b", "val", 2500), ("c", "val", 7), ("d", "val", 2092),
    ]  # fmt: skip
    for row, (begin, end) in zip(rows, ((0, 2500), (2500, 2507), (2507, 4599)), strict=True):
        alone = LossRecorder(end - begin)
        alone.extend(nats[begin:end])
        expected = paired.loss(alone.result("text"))
        assert row["loss"] == pytest.approx(expected.value, rel=1e-6)
        if row["file"] == "c":
            assert row["standard_error"] == ""  # too short
        else:
            assert row["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 4599])
def test_size_of_the_evaluation_batches_does_not_matter(size):
    nats = np.random.default_rng(1).exponential(1.5, 4599).round(3)
    for row, other in zip(recorded(nats, size), recorded(nats, 512), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert row["characters"] == other["characters"]


@pytest.mark.parametrize("files", [[], [("a", 0, 9)], [("a", 0, 1), ("b", 1, 9)]])
def test_split_with_text_of_one_file_has_no_table(files):
    recorder = FileRecorder(files)
    recorder.extend(np.ones(8))
    assert recorder.rows("val") == []
