"""Qwen3-Next: gated delta nets and gated attention, in front of mixtures with a shared expert."""

from puzzle_nas.families.base import Place
from puzzle_nas.families.hybrids import HybridFamily, delta_state_bytes
from puzzle_nas.families.qwen3_moe import Qwen3Moe

DELTA = Place("linear_attn", "input_layernorm", None)


class Qwen3Next(HybridFamily, Qwen3Moe):
    """The delta nets are opaque."""

    model_type = "qwen3_next"
    opaque = {"linear_attention": DELTA}

    def state_bytes(self, config, slot, itemsize):
        """See `Family.state_bytes`."""
        return delta_state_bytes(config, itemsize) if slot == "linear_attention" else 0
