import pytest

from minigpt.data import text


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def small_chunks(request, monkeypatch):
    """Reduce chunks and pieces to a few bytes, so that a cut falls between any two characters."""
    monkeypatch.setattr(text, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(text, "PIECE_BYTES", 2 * request.param)
