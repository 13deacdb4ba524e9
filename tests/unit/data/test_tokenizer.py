import numpy as np
import pytest
from helpers.workspace import FULL
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.tokenizer import CODE_POINTS, Tokenizer
from minigpt.data.unicode import code_points
from minigpt.errors import UserError


def tokenizer_of(text):
    seen = np.zeros(CODE_POINTS, dtype=bool)
    seen[code_points(text)] = True
    return Tokenizer.from_seen(seen)


@settings(max_examples=10_000 if FULL else 500, deadline=None)
@given(st.text(min_size=1))
def test_any_text_round_trips(text):
    tokenizer = tokenizer_of(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.characters == "".join(sorted(set(text)))


@pytest.mark.parametrize(
    "size, dtype", [(1, np.uint8), (256, np.uint8), (257, np.int16), (32768, np.int16), (32769, np.int32)]
)
def test_dtype_is_the_smallest_that_holds_every_id(size, dtype):
    tokenizer = Tokenizer("".join(map(chr, range(ord("a"), ord("a") + size))))
    for text in (tokenizer.characters, "a"):
        ids = tokenizer.encode(text)
        assert ids.dtype == dtype
        assert ids.tolist() == list(range(len(text)))
        assert ids.flags.writeable


def test_unknown_character_is_reported_with_position_and_code_point():
    with pytest.raises(UserError, match=r"the prompt: character 3, 'é' \(U\+00E9 LATIN SMALL LETTER E WITH ACUTE\)"):
        tokenizer_of("abc").encode("abé", "the prompt")


def test_saved_vocabulary_loads_equal(tmp_path):
    tokenizer = tokenizer_of('नमस्ते\n\u2028𝄞"\\')
    tokenizer.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").characters == tokenizer.characters


@pytest.mark.parametrize("content", ["", "{", "[]", '{"characters": ""}', '{"characters": "aa"}', '{"characters": 3}'])
def test_invalid_vocabulary_is_rejected(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json: not a vocabulary"):
        Tokenizer.load(tmp_path / "t.json")


def test_prompt_is_normalized_like_the_training_text():
    tokenizer = Tokenizer("abé", "NFC")
    assert tokenizer.encode("ae\u0301b").tolist() == [0, 2, 1]
    assert tokenizer.without_unknown("ae\u0301xb€x") == ("aéb", "x€")
    with pytest.raises(UserError, match="character 2"):
        Tokenizer("abé").encode("ae\u0301b")
