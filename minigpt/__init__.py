"""A character-level, decoder-only GPT: the library that the four stages share.

Nouns live here, verbs in ``stages/``. Imports go one way, down this list to the names above:
errors, files, params, tokenizer, corpus, baselines, memorised, ranks, model, optimizer, score, report, checkpoint,
generator, trainer, journal, machine, tracking, serving, dagshub. Three stand apart: process, which acts before torch
is imported, and charts and page, which show what was measured.
"""

__version__ = "0.1.0"
