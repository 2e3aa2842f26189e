"""Parent families: one small adapter each, taking models apart, loading them."""

from puzzle_nas.families.anatomy import Anatomy, Head, LayerInputs, SubBlock
from puzzle_nas.families.loading import (
    architecture_of,
    build,
    child_config,
    find_checkpoint,
    head_dim_of,
    load_model,
    load_parent,
    load_tokenizer,
    load_with_tokenizer,
    open_parent,
    parent_checkpoint,
    probe_model,
    save_model,
)
from puzzle_nas.families.registry import FAMILIES, family_of

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Head",
    "LayerInputs",
    "SubBlock",
    "architecture_of",
    "build",
    "child_config",
    "family_of",
    "find_checkpoint",
    "head_dim_of",
    "load_model",
    "load_parent",
    "load_tokenizer",
    "load_with_tokenizer",
    "open_parent",
    "parent_checkpoint",
    "probe_model",
    "save_model",
]
