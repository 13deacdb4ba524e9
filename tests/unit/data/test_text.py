import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.data import text as text_module
from minigpt.data.text import find_text_files, read_piece, split_into_pieces
from minigpt.errors import UserError


def read_text(source, normalize="none"):
    """Read ``source`` piece by piece and join the pieces."""
    pieces = split_into_pieces(find_text_files(source), normalize)
    chunks = [points for piece in pieces for points in read_piece(piece, normalize)]
    return "".join(points.astype("<u4").tobytes().decode("utf-32-le") for points in chunks)


@pytest.mark.parametrize(
    "data, text",
    [
        ("नमस्ते".encode(), "नमस्ते"),
        (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n"),
        ("𝄞é\r".encode(), "𝄞é\n"),
    ],
)
def test_chunk_size_does_not_change_the_text(tmp_path, small_chunks, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == text


def test_folder_is_read_in_name_order_with_each_file_on_a_new_line(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.md", "no"), ("d.txt", ""), ("e.txt", "third\n")):
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path) == "first\nsecond\nthird\n"


TEXTS = st.lists(
    st.text("ab \n\r\u0301\u0323é\ufeff\u0928\u092e\u093c한\u1100\u1161\U0001d11e", max_size=40), max_size=6
)


@settings(deadline=None)
@given(texts=TEXTS, size=st.integers(1, 40), normalize=st.sampled_from(["none", "NFC"]), mark=st.booleans())
@example(texts=["aa\u0928\r\n\u00e9"], size=11, normalize="NFC", mark=True)
def test_pieces_join_to_the_whole_text(tmp_path_factory, texts, size, normalize, mark):
    folder = tmp_path_factory.mktemp("texts")
    expected = ""
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
        plain = (text if mark else text.removeprefix("\ufeff")).replace("\r\n", "\n").replace("\r", "\n")
        expected += ("\n" if plain and expected and expected[-1] != "\n" else "") + plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK_BYTES", max(1, size // 3))
        patch.setattr(text_module, "PIECE_BYTES", size)
        found = read_text(folder, normalize) if texts else ""
    assert found == (unicodedata.normalize("NFC", expected) if normalize == "NFC" else expected)


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
    ],
)
def test_invalid_bytes_are_reported_with_their_offset(tmp_path, small_chunks, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.txt: .*{message}"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_encoding_with_a_byte_order_mark_is_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 9, encoding=encoding)
    with pytest.raises(UserError, match=f"not UTF-8 at byte 0 .*`iconv -f {encoding.upper()} -t UTF-8`"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("to be\n".encode(f"{encoding}-le"))
    with pytest.raises(UserError, match="NUL at byte 1; if it is a text in UTF-16 or UTF-32, save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_missing_source_is_reported(tmp_path):
    for source, message in ((tmp_path / "none.txt", r"none\.txt: no such file"), (tmp_path, r"no \.txt file")):
        with pytest.raises(UserError, match=message):
            find_text_files(source)


def test_source_that_is_no_file_is_reported_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "a-pipe.txt")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.txt").symlink_to("none")
    (tmp_path / "loop").symlink_to("loop")
    for source, message in (
        (tmp_path, r"pipe\.txt: a named pipe, not a file; remove it"),
        (tmp_path / "a-pipe.txt", r"pipe\.txt: a named pipe"),
        (tmp_path / "links", r"links/a\.txt: the link points to no file"),
        (tmp_path / "loop", "not readable: Too many levels of symbolic links"),
        (tmp_path / "a-pipe.txt/a", "not readable: Not a directory"),
        ("/dev/zero", "a device or a socket, not a file"),
        ("a\0b", "not readable: embedded null byte"),
        ("a" * 5000, "not readable: File name too long"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find_text_files(Path(source))
        assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_file_that_became_shorter_is_rejected(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh")
    (piece,) = split_into_pieces([path], "none")
    path.write_text("abc")
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        list(read_piece(piece))
