"""Ministral 8B: as Mistral, with windows by layer."""

from puzzle_nas.families.base import Family


class Ministral(Family):
    """head_dim is free of hidden_size / heads."""

    model_type = "ministral"
