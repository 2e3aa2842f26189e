"""Mixtral: a mixture of few, wide experts in every layer."""

from puzzle_nas.families.mixtures import MixtureFamily


class Mixtral(MixtureFamily):
    """Mistral's attention."""

    model_type = "mixtral"
    expert_width = "intermediate_size"
