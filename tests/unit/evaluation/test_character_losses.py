import io

import numpy as np
import pytest
import torch
from helpers.workspace import params_with

from minigpt.data.dataset import Split
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.evaluation import character_losses
from minigpt.evaluation.character_losses import FILE, CharacterLosses, LossRecorder, text_digest
from minigpt.evaluation.loss import score
from minigpt.model import GPT


def saved(folder, **changes):
    losses = {"nats": np.arange(5, dtype=np.float32), "segment": 2, "characters": 9, "text": "t"} | changes
    CharacterLosses(**losses).save(folder)
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize("block_size", [16, 7])
def test_recorded_losses_are_in_reading_order_for_any_context_length(block_size):
    torch.manual_seed(0)
    model = GPT(params_with(model={"init": "normal", "block_size": block_size}).model, 11).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 11, 1003).astype(np.uint8))
    recorder = LossRecorder(1002)
    scored = score(model, Split(tokens), callback=recorder.add)
    losses = recorder.result("text")
    assert (losses.segment, losses.characters, len(losses.nats)) == (1, 1002, 1002)
    assert losses.nats.sum(dtype=np.float64) == pytest.approx(scored.nats)
    start = 20 * block_size
    window = tokens[start : start + block_size + 1].long()
    expected = -model(window[None, :-1]).log_softmax(-1)[0].gather(-1, window[1:, None])[:, 0]
    np.testing.assert_allclose(losses.nats[start : start + block_size], expected.detach(), rtol=1e-4)


def test_long_text_is_stored_as_sums_of_segments(monkeypatch):
    monkeypatch.setattr(character_losses, "MAX_SEGMENTS", 10)
    recorder, nats = LossRecorder(37), np.arange(37.0)
    for begin in range(0, 37, 5):
        recorder.extend(nats[begin : begin + 5])
    losses = recorder.result("text")
    assert losses.segment == 4
    assert losses.nats.tolist() == [nats[begin : begin + 4].sum() for begin in range(0, 37, 4)]
    assert losses.lengths.tolist() == [4] * 9 + [1]


def test_file_is_read_as_written_and_equal_losses_give_equal_bytes(tmp_path):
    content = saved(tmp_path)
    read = CharacterLosses.load(io.BytesIO(content), "file")
    assert (read.nats.tolist(), read.segment, read.characters, read.text) == ([0, 1, 2, 3, 4], 2, 9, "t")
    assert saved(tmp_path) == content


def test_damaged_file_is_reported(tmp_path):
    content = saved(tmp_path)
    damaged = [b"", content[:100], content[:-30], b"PK" + content[2:500], saved(tmp_path, characters=20)]
    damaged += [saved(tmp_path, segment=0), saved(tmp_path, nats=np.arange(5.0))]
    for data in damaged:
        with pytest.raises(UserError, match=r"^results/losses: damaged: .*dvc checkout"):
            CharacterLosses.load(io.BytesIO(data), "results/losses")


def test_digest_of_a_text_does_not_depend_on_the_vocabulary():
    text = "abcab"
    digests = {text_digest(Tokenizer(chars).encode(text), Tokenizer(chars)) for chars in ("abc", " abcdé")}
    assert len(digests) == 1
    assert text_digest(Tokenizer("abc").encode("abcaa"), Tokenizer("abc")) not in digests
