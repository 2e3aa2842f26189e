"""gpt-oss: biases in router and experts, learned sinks in attention, a window in every second layer."""

import dataclasses

from puzzle_nas.families.mixtures import EXPERTS, MixtureFamily


class GptOss(MixtureFamily):
    """Its mixture returns a tuple."""

    model_type = "gpt_oss"
    expert_width = "intermediate_size"
    places = MixtureFamily.places | {"experts": dataclasses.replace(EXPERTS, pair=True)}
