"""Qwen3: norms on queries and keys."""

from puzzle_nas.families.base import Family


class Qwen3(Family):
    """Sliding windows by layer; head_dim is free of hidden_size / heads."""

    model_type = "qwen3"
