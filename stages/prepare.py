"""Encode the text, and write the vocabulary, the training split and the validation split.

python -m stages.prepare        data.source -> data/prepared/{train,val}.npy, tokenizer.json
"""

from __future__ import annotations

from pathlib import Path

from minigpt import errors, params
from minigpt.data.checks import check_corpus
from minigpt.data.encode import encode_corpus
from minigpt.files import atomic_directory
from stages import PREPARED


def main() -> None:
    """Run the stage."""
    settings = params.load()
    data = settings.data
    with atomic_directory(PREPARED) as folder:
        tokenizer, n_train, n_val = encode_corpus(Path(data.source), data.val_fraction, folder, data.normalize)
        check_corpus(settings, tokenizer, n_train)
    print(
        f"minigpt: {data.source}: {n_train:,} training characters, {n_val:,} validation characters, "
        f"vocabulary of {tokenizer.vocab_size}"
    )


if __name__ == "__main__":
    errors.run(main)
