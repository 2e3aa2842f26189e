"""What families have in common whose layers of some types have a mixer of their own in attention's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedConfig

from puzzle_nas.families.base import Family, Place, Slot
from puzzle_nas.specs import ParentsOwn


class HybridFamily(Family):
    """Such a mixer is kept as it is or left out; nothing inside of it is searched."""

    opaque: ClassVar[Mapping[str, Place]]
    """Where these mixers are, by what `layer_types` calls the layers; their slots are called the same."""

    def slots(self, config: PreTrainedConfig, layer: int) -> dict[str, Slot]:
        """See `Family.slots`."""
        found = super().slots(config, layer)
        kind = config.layer_types[layer]
        if kind not in self.opaque:
            return found
        del found["attention"]
        return {kind: Slot(self.opaque[kind], ParentsOwn(kind)), **found}


def delta_state_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Of a gated delta net: the convolution's last tokens, and a float32 matrix for each value head."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (2 * keys + values) * config.linear_conv_kernel_dim * itemsize + 4 * values * config.linear_key_head_dim
