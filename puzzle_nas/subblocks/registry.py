"""The variants we know. A new one is one class in one file and one line here."""

from puzzle_nas.architecture import Spec
from puzzle_nas.subblocks import attention, ffn
from puzzle_nas.subblocks.base import Variant

VARIANTS: dict[type[Spec], Variant] = {
    variant.spec_class: variant()
    for variant in (attention.Grouped, attention.Linear, attention.NoOp, ffn.Gated, ffn.Linear, ffn.NoOp)
}


def variant_of(spec: Spec) -> Variant:
    """The variant that a spec describes."""
    return VARIANTS[type(spec)]
