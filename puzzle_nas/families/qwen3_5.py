"""Qwen3.5 (text): gated delta nets and gated attention, in front of FFNs."""

from puzzle_nas.families.hybrids import HybridFamily, delta_state_bytes
from puzzle_nas.families.qwen3_next import DELTA


class Qwen35(HybridFamily):
    """The delta nets are opaque."""

    model_type = "qwen3_5_text"
    opaque = {"linear_attention": DELTA}

    def state_bytes(self, config, slot, itemsize):
        """See `Family.state_bytes`."""
        return delta_state_bytes(config, itemsize) if slot == "linear_attention" else 0
