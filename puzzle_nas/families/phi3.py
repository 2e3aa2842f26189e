"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one matrix, gate and up projection in another."""

from puzzle_nas.families.base import Family


class Phi3(Family):
    """Windows in all layers or in none; part of each head may go without rotary positions."""

    model_type = "phi3"
