"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from puzzle_nas.families.base import Family


class Qwen2(Family):
    """Sliding windows by layer."""

    model_type = "qwen2"
