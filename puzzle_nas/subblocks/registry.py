"""The variants we know. A new one is one class in one file and one line here."""

from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, Mixture, NoOp, Spec, WindowAttention
from puzzle_nas.subblocks import attention, experts, ffn, linear
from puzzle_nas.subblocks.base import Variant

VARIANTS: dict[type[Spec], Variant] = {
    GroupedAttention: attention.Grouped(),
    WindowAttention: attention.Window(),
    GatedFFN: ffn.Gated(),
    Mixture: experts.Experts(),
    Linear: linear.LinearVariant(),
    NoOp: linear.NoOpVariant(),
}


def variant_of(spec: Spec) -> Variant:
    """The variant that a spec describes."""
    return VARIANTS[type(spec)]
