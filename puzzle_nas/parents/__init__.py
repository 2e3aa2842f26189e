"""A parent as it lies on disk: every file's header, tensors, configuration and tokenizer examined before loading."""

from puzzle_nas.parents.examine import Examined, describe, examine
from puzzle_nas.parents.fingerprint import parent_fingerprint
from puzzle_nas.parents.problems import PROBLEMS

__all__ = ["PROBLEMS", "Examined", "describe", "examine", "parent_fingerprint"]
