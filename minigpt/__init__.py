"""A character-level, decoder-only GPT: the library that the four stages share.

Nouns live here, verbs in ``stages/``. Imports go one way, down this list to the names above:
errors, files, params, tokenizer, corpus, ranks, model, optimizer, score, drafts, checkpoint, decoder, generator,
trainer, journal, machine, tracking, serving, dagshub. Three stand apart: process, which acts before torch is imported,
charts, and __main__, which writes in the terminal.
"""

__version__ = "0.1.0"
