"""Tests of the splits of a text, through the files that the stage prepare writes."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import splits
from minigpt.data import text as text_module
from minigpt.data.dataset import load_corpus
from minigpt.data.encode import encode_corpus
from minigpt.data.splits import FileSizes, SplitRule, lay_out, load_files, ranges
from minigpt.errors import UserError


def write_texts(folder, texts):
    """Write each text to a file of ``folder`` and return the folder."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def encode(source, target, val_fraction, normalize="none", **options):
    """Encode a text and return the text of each split by its name."""
    target.mkdir(exist_ok=True)
    encode_corpus(source, val_fraction, target, normalize, **options)
    corpus = load_corpus(target, with_test=True)
    found = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    return {name: corpus.tokenizer.decode(split.tokens.numpy()) for name, split in found.items() if split}


FILES = {"a.txt": "abcdefghij", "b/c.txt": "KLMNOPQRSTKLMNOPQRS\n", "d.txt": "0123456789"}
"""Ten, twenty and ten characters. The first file does not end in a newline, and gets one."""


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["abcdefghij\nKLMNOPQRSTKLMNOPQRS\n0", "123456789"]),
        ({"test_fraction": 0.1}, ["abcdefghij\nKLMNOPQRSTKLMNOPQ", "RS\n01234", "56789"]),
        ({"split": "each_file"}, ["abcdefghKLMNOPQRSTKLMNOP01234567", "ij\nQRS\n89"]),
        ({"split": "each_file", "test_fraction": 0.1}, ["abcdefgKLMNOPQRSTKLMN0123456", "hiOPQR78", "j\nS\n9"]),
    ],
)
def test_splits_have_these_texts(tmp_path, small_chunks, options, expected):
    found = encode(write_texts(tmp_path / "texts", FILES), tmp_path / "out", 0.2, **options)
    assert list(found.values()) == expected
    files = load_files(tmp_path / "out", {name: len(text) for name, text in found.items()})
    assert [each.file for each in files] == ["a.txt", "b/c.txt", "d.txt"]
    assert [sum(each.sizes.values()) for each in files] == [11, 20, 10]
    parts = [[found[name][begin:end] for _, begin, end in ranges(files, name)] for name in found]
    assert ["".join(part) for part in parts] == expected


def split_text(text, val_fraction, test_fraction):
    """Return the parts of a text; the definition that the encoder is compared with."""
    cut, last = int(len(text) * (1 - val_fraction - test_fraction)), int(len(text) * (1 - test_fraction))
    return text[:cut], text[cut:last], text[last:]


OPTIONS = st.fixed_dictionaries({
    "val_fraction": st.sampled_from([0.1, 0.25, 0.4]),
    "test_fraction": st.sampled_from([0.0, 0.1, 0.5]),
    "split": st.sampled_from(["end", "each_file"]),
    "normalize": st.sampled_from(["none", "NFC"]),
})  # fmt: skip
TEXTS = st.lists(st.text("ab\n\r\u0301\u0327eé한\u1112\u1161\U0001d11e", max_size=40), max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, options=OPTIONS, chunk=st.sampled_from([1, 3, 16, 1 << 20]))
def test_splits_are_the_parts_of_the_files_one_after_the_other(tmp_path_factory, texts, options, chunk):
    texts = ["abé" * 8, *texts]  # never too short to split
    folder = tmp_path_factory.mktemp("splits")
    source = write_texts(folder / "texts", {f"{number}.txt": text for number, text in enumerate(texts)})
    read = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts if text]
    read = [text + "\n" * (not text.endswith("\n")) for text in read[:-1]] + read[-1:]
    if options["normalize"] == "NFC":
        read = [unicodedata.normalize("NFC", text) for text in read]
    whole = read if options["split"] == "each_file" else ["".join(read)]
    parts = [split_text(text, options["val_fraction"], options["test_fraction"]) for text in whole]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK_BYTES", chunk)
        patch.setattr(text_module, "PIECE_BYTES", 2 * chunk)
        found = encode(source, folder / "out", **options)
    expected = ["".join(part) for part in zip(*parts, strict=True)]
    assert [*found.values(), *[""] * (3 - len(found))] == expected
    files = load_files(folder / "out", {name: len(text) for name, text in found.items()})
    assert [sum(each.sizes.values()) for each in files] == (list(map(len, read)) if len(read) > 1 else [])


@pytest.mark.parametrize("test_fraction", [0.0, 0.2])
def test_one_file_has_the_same_splits_with_both_rules(tmp_path, test_fraction):
    written = []
    for split in ("end", "each_file"):
        out = tmp_path / split
        out.mkdir()
        source = tmp_path / "a.txt"
        source.write_text("to be or not to be\n" * 9)
        encode_corpus(source, 0.1, out, test_fraction=test_fraction, split=split)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert ("test.npy" in written[0]) == bool(test_fraction)
    assert splits.FILE not in written[0]


@pytest.mark.parametrize(
    "text, fractions, message",
    [
        (
            "ab\n" * 5,
            (0.1, 0.1),
            r"15 characters are too few to split \(data\.val_fraction = 0\.1, data\.test_fr.* 0\.1\)",
        ),
        ("ab\n" * 9, (0.9, 0.09), "27 characters are too few to split"),
    ],
)
def test_every_split_needs_two_characters(tmp_path, text, fractions, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        encode_corpus(tmp_path / "a.txt", fractions[0], tmp_path, test_fraction=fractions[1])


def test_test_split_is_opened_only_on_request(tmp_path):
    found = encode(write_texts(tmp_path / "texts", FILES), tmp_path / "out", 0.2, test_fraction=0.2)
    corpus = load_corpus(tmp_path / "out")
    assert corpus.test is None
    assert corpus.n_test == len(found["test"]) == 9
    (tmp_path / "out/test.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"test\.npy: damaged"):
        load_corpus(tmp_path / "out")


def test_name_of_a_file_with_invalid_bytes_can_be_written(tmp_path):
    folder = write_texts(tmp_path / "texts", {"a.txt": "abc" * 9, "b\udcff.txt": "def" * 9})
    encode(folder, tmp_path / "out", 0.2)
    files = load_files(tmp_path / "out", {"train": 44, "val": 11})
    assert [each.file for each in files] == ["a.txt", "b\ufffd.txt"]


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "{}",
        "[]",
        "[1]",
        '[{"file": "a.txt", "train": 9, "val": 1}]',
        '[{"file": "a.txt", "train": 8, "val": null}]',
    ],
)
def test_damaged_sizes_of_the_files_are_rejected(tmp_path, content):
    (tmp_path / splits.FILE).write_text(content)
    with pytest.raises(UserError, match=r"files\.json: damaged: .*dvc repro --force prepare"):
        load_files(tmp_path, {"train": 8, "val": 2})


def test_segments_cover_a_text_of_many_small_files():
    files = [(str(number), number % 4) for number in range(1000)]
    layout = lay_out(files, SplitRule(0.3, 0.2, "each_file"))
    bounds = [0, *(segment.end for segment in layout.segments)]
    assert bounds[:-1] == [segment.begin for segment in layout.segments]
    assert bounds[-1] == sum(layout.sizes.values()) == sum(size for _, size in files)
    assert layout.files[3] == FileSizes("3", {"train": 1, "val": 1, "test": 1})
    overlaps = splits.overlapping(layout.segments, 700, 710)
    assert overlaps[0].begin <= 700 < overlaps[0].end
    assert overlaps[-1].begin < 710 <= overlaps[-1].end
