"""A character-level, decoder-only GPT: the library that the four stages share.

Nouns live here, verbs in ``stages/``. Imports go one way, down this list to the names above:
errors, files, params, tokenizer, corpus, baselines, memorised, group, model, optimizer, score, report, drafts,
checkpoint, decoder, native, generator, trainer, journal, machine, tracking, serving, dagshub. Five stand apart:
process, which acts before torch is imported; launcher, which starts several of them; charts and page, which show what
was measured; and __main__, which writes in a terminal.
"""

__version__ = "0.1.0"
