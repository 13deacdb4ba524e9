"""Character-level, decoder-only GPT: the library of the four stages in ``stages/``.

Read ``model.py`` first. The ``__init__.py`` of each part describes it. A test, tests/unit/test_imports.py, lists the
parts that each may import.
"""

__version__ = "0.2.0"
