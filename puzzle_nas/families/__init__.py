"""Parent families: one small adapter each, and loading a parent or a child."""

from puzzle_nas.families.loading import (
    Machine,
    child_config,
    find_checkpoint,
    load_model,
    load_parent,
    load_tokenizer,
    machine_of,
    open_parent,
    save_model,
    to_puzzle,
)
from puzzle_nas.families.registry import FAMILIES, family_of

__all__ = [
    "FAMILIES",
    "Machine",
    "child_config",
    "family_of",
    "find_checkpoint",
    "load_model",
    "load_parent",
    "load_tokenizer",
    "machine_of",
    "open_parent",
    "save_model",
    "to_puzzle",
]
