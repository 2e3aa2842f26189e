"""Variants of sub-blocks: how each kind starts from the parent, and what it weighs."""

from puzzle_nas.subblocks.base import LayerContext, Variant
from puzzle_nas.subblocks.layers import Weights, run_with, subblock_layer, subblock_weights, weights_of_slot
from puzzle_nas.subblocks.registry import VARIANTS, variant_of
from puzzle_nas.subblocks.statistics import LayerStatistics, observe_layer

__all__ = [
    "VARIANTS",
    "LayerContext",
    "LayerStatistics",
    "Variant",
    "Weights",
    "observe_layer",
    "run_with",
    "subblock_layer",
    "subblock_weights",
    "variant_of",
    "weights_of_slot",
]
