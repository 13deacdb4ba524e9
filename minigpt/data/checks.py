"""Checks of a text against the params, before a training: every stage that follows must be able to use the text."""

import os
from collections.abc import Iterable
from pathlib import Path

from minigpt.data.encode import MIN_PARALLEL_BYTES, survey
from minigpt.data.splits import SplitRule
from minigpt.data.text import find_text_files, split_into_pieces
from minigpt.data.tokenizer import Tokenizer
from minigpt.errors import UserError
from minigpt.files import MODEL, PREPARED, RESULTS
from minigpt.params import Params

OUTPUTS = (PREPARED, MODEL, *(RESULTS / stage for stage in ("train", "evaluate", "sample")))
"""Folders that the stages in ``dvc.yaml`` write, and DVC deletes before."""


def check_paths(settings: Params) -> None:
    """Raise a UserError if a stage would delete its own input."""
    for name, path in (("data.source", settings.data.source), ("train.init_from", settings.train.init_from)):
        for output in OUTPUTS if path else ():
            used, written = Path(path).resolve(), output.resolve()
            if used.is_relative_to(written) or (written.is_relative_to(used) and name == "data.source"):
                fix = "name a copy" if used.is_relative_to(written) else "name a file or folder in it"
                raise UserError(f"{name}: {path}: DVC deletes {output} before a stage writes it; {fix}")


def check_text(settings: Params) -> str:
    """Read the text of ``data.source`` and check it as the stages do; raise a UserError if one of them would fail.

    Returns:
        why the text was not read, or an empty string. One that does not exist may not be downloaded yet.
    """
    check_paths(settings)
    data, source = settings.data, Path(settings.data.source)
    if not os.path.lexists(source):
        return f"{source} does not exist"
    paths = find_text_files(source)
    if sum(path.stat().st_size for path in paths) >= MIN_PARALLEL_BYTES:
        return f"{source} was not read, because it has more than {MIN_PARALLEL_BYTES // 1_000_000} MB"
    rule = SplitRule(data.val_fraction, data.test_fraction, data.split)
    found = survey(source, list(split_into_pieces(paths, data.normalize)), rule, data.normalize)
    check_corpus(settings, found.tokenizer, found.layout.sizes["train"])
    return ""


def check_corpus(settings: Params, tokenizer: Tokenizer, n_train: int) -> None:
    """Raise a UserError if the later stages cannot use a vocabulary and a training split of ``n_train`` characters."""
    check_context(n_train, settings.model.block_size)
    check_prompts(settings.sample.prompts, tokenizer)


def check_context(n_train: int, block_size: int) -> None:
    """Raise a UserError if the training split is shorter than one window of ``block_size`` characters and a target."""
    if n_train <= block_size:
        raise UserError(
            f"the training split has {n_train} characters, "
            f"too few for model.block_size = {block_size}: use a longer text or a shorter context"
        )


def check_prompts(prompts: Iterable[str], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the prompts by their names in messages. Raise a UserError if one has an unknown character."""
    named = {f"params.yaml: sample.prompts[{index}]": prompt for index, prompt in enumerate(prompts)}
    for name, prompt in named.items():
        try:
            tokenizer.encode(prompt, name)
        except UserError as error:
            raise UserError(f"{error}; use a prompt of characters that do") from None
    return named
