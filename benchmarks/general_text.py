"""Text of many kinds, in ../shared/data, that no run has learned from: books, mail, speeches, manuals, ..."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.evaluation.text import domain_tokens
from puzzle_nas.families import load_parent, load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.comparison import ParentReference

TEXT = Path("../shared/data/validation")
LIBRARY_KINDS = ("code", "docs-python")
"""Kinds of which the quickstart, whose text is Python's library, has read a part."""
GENERAL_TOKENS = 1_024
"""Of each kind."""


def general_reference(run: RunFolder) -> ParentReference:
    """The run's parent on equally many tokens of each kind but `LIBRARY_KINDS`."""
    files = [str(path) for path in sorted(TEXT.glob("*.jsonl.gz")) if path.name.split(".")[0] not in LIBRARY_KINDS]
    if not files:
        raise SystemExit(f"{TEXT} is not here: nothing to compare on.")
    recipe = open_run(run)
    parent = load_parent(recipe, run)
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    tokenizer, length = load_tokenizer(parent_checkpoint(run)), recipe.data.sequence_length
    kinds = [domain_tokens([file], tokenizer, length, GENERAL_TOKENS, recipe.seed) for file in files]
    return ParentReference(parent, torch.cat(kinds))
