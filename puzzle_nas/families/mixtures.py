"""What families with mixtures of experts have in common; each is a file of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from transformers import PreTrainedConfig

from puzzle_nas.families.base import ATTENTION, FFN, Family, Slot
from puzzle_nas.specs import GatedFFN, Mixture

EXPERTS = dataclasses.replace(FFN, last=None)
"""Where an FFN would be; there is no one last matrix."""


class MixtureFamily(Family):
    """A mixture in place of the FFN, in the layers that `is_sparse` names."""

    places = {"attention": ATTENTION, "ffn": FFN, "experts": EXPERTS}
    expert_width: ClassVar[str] = "moe_intermediate_size"
    """The field that holds the channels of one expert."""

    def is_sparse(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether a layer has a mixture; the others have an FFN."""
        return True

    def slots(self, config: PreTrainedConfig, layer: int) -> dict[str, Slot]:
        """See `Family.slots`."""
        width = getattr(config, self.expert_width)
        own = (
            Mixture(config.num_experts, config.num_experts_per_tok, width)
            if self.is_sparse(config, layer)
            else GatedFFN(config.intermediate_size)
        )
        return {
            "attention": Slot(self.places["attention"], self.attention(config, layer)),
            own.slot: Slot(self.places[own.slot], own),
        }

    def fields(self, changes):
        """See `Family.fields`; transformers understands `num_experts` in all of these families."""
        return {self.expert_width if name == "moe_intermediate_size" else name: v for name, v in changes.items()}
