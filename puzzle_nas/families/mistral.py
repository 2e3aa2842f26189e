"""Mistral: as Llama, with one sliding window for all layers."""

from puzzle_nas.families.base import Family


class Mistral(Family):
    """Windows in all layers or in none."""

    model_type = "mistral"
