"""Encode the text, and write the vocabulary and the splits.

python -m stages.prepare        data.source -> data/prepared/{train,val,test}.npy, tokenizer.json, files.json
"""

from __future__ import annotations

import os
from pathlib import Path

from minigpt import params, program
from minigpt.data.checks import check_corpus
from minigpt.data.encode import encode_corpus
from minigpt.files import PREPARED, atomic_directory
from minigpt.tracking.sender import start_sender


def main() -> None:
    """Run the stage."""
    settings = params.load()
    if "DVC_STAGE" in os.environ:
        start_sender()  # imports MLflow meanwhile, for the next stage
    data = settings.data
    with atomic_directory(PREPARED) as folder:
        tokenizer, sizes = encode_corpus(
            Path(data.source),
            data.val_fraction,
            folder,
            data.normalize,
            test_fraction=data.test_fraction,
            split=data.split,
        )
        check_corpus(settings, tokenizer, sizes["train"])
    test = f"{sizes['test']:,} test characters, " if "test" in sizes else ""
    print(
        f"minigpt: {data.source}: {sizes['train']:,} training characters, {sizes['val']:,} validation characters, "
        f"{test}vocabulary of {tokenizer.vocab_size}"
    )


if __name__ == "__main__":
    program.run(main)
