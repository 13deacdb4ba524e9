"""Character-level, decoder-only GPT: the library of the four stages in ``stages/``.

Read ``model.py`` first. Each part's ``__init__.py`` says what belongs there and what it may import.
"""

__version__ = "0.1.0"
