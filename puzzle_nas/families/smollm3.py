"""SmolLM3: as Llama, without rotary positions in every fourth layer."""

from puzzle_nas.families.base import Family


class SmolLM3(Family):
    """Which layers have none, and windows, is known by the number of the layer."""

    model_type = "smollm3"
