"""Read a text; write its vocabulary and its tokens, split in two.

python -m stages.prepare        data.source -> data/prepared/{train,val}.npy, tokenizer.json
"""

from __future__ import annotations

from pathlib import Path

from minigpt import errors, params
from minigpt.data import encode
from minigpt.files import atomic_directory
from stages import PREPARED


def main() -> None:
    """Run the stage."""
    data = params.load().data
    with atomic_directory(PREPARED) as folder:
        tokenizer, n_train, n_val = encode.encode_corpus(Path(data.source), data.val_fraction, folder, data.normalize)
    print(
        f"minigpt: {data.source}: {n_train:,} characters to train on, {n_val:,} to validate, "
        f"{tokenizer.vocab_size} different ones"
    )


if __name__ == "__main__":
    errors.run(main)
