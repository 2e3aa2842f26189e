"""GLM-4 of 2024 (9B): as Llama, with rotary positions on half of each head, gate and up projection in one matrix."""

from puzzle_nas.families.base import Family


class Glm(Family):
    """Biases on queries, keys and values."""

    model_type = "glm"
