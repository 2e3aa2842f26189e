"""LFM2: short convolutions, and attention in some layers."""

from puzzle_nas.families.base import Place, Slot
from puzzle_nas.families.hybrids import HybridFamily
from puzzle_nas.specs import GatedFFN


class Lfm2(HybridFamily):
    """The convolutions are opaque. The configuration's FFN width is rounded by rules of the family's own."""

    model_type = "lfm2"
    places = {
        "attention": Place("self_attn", "operator_norm", "out_proj", pair=True),
        "ffn": Place("feed_forward", "ffn_norm", "w2"),
    }
    opaque = {"conv": Place("conv", "operator_norm", None)}
    final_norm = "embedding_norm"

    def slots(self, config, layer):
        """See `Family.slots`."""
        return super().slots(config, layer) | {"ffn": Slot(self.places["ffn"], GatedFFN(real_width(config)))}

    def fields(self, changes):
        """See `Family.fields`; a width is meant as it is."""
        return changes | ({"block_auto_adjust_ff_dim": False} if "intermediate_size" in changes else {})

    def state_bytes(self, config, slot, itemsize):
        """The convolution's last tokens."""
        return config.hidden_size * config.conv_L_cache * itemsize if slot == "conv" else 0


def real_width(config) -> int:
    """Channels of the FFN, as `Lfm2MLP` derives them."""
    width = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is None:
        return width
    multiple = config.block_multiple_of
    return -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple
