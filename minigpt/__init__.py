"""Character-level, decoder-only GPT: the library of the four stages in ``stages/``.

Read ``model.py`` first. The ``__init__.py`` of each part describes its contents and the imports that it may have.
"""

__version__ = "0.2.0"
