"""Gemma 3, its text models: as Gemma 2, with norms on queries and keys."""

from puzzle_nas.families.gemma2 import Gemma2


class Gemma3Text(Gemma2):
    """Windows in five layers of six, with rotary positions of their own."""

    model_type = "gemma3_text"
