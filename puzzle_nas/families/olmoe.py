"""OLMoE: many small experts in every layer, norms over all queries and keys."""

from puzzle_nas.families.mixtures import MixtureFamily


class Olmoe(MixtureFamily):
    """Router weights are not normalised again after the choice."""

    model_type = "olmoe"
    expert_width = "intermediate_size"
