"""Ministral 3: as Mistral, with queries scaled by position."""

from puzzle_nas.families.base import Family


class Ministral3(Family):
    """Windows in all layers or in none."""

    model_type = "ministral3"
