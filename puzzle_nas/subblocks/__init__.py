"""Variants of sub-blocks: how each kind starts from the parent, and how it is run."""

from puzzle_nas.subblocks.base import Context, Origin, Variant
from puzzle_nas.subblocks.layers import Weights, made_subblock, run_with, subblock_weights, weights_of_slot, windows_of
from puzzle_nas.subblocks.registry import VARIANTS, variant_of
from puzzle_nas.subblocks.statistics import LayerStatistics, Observe, add_observations, observed

__all__ = [
    "VARIANTS",
    "Context",
    "LayerStatistics",
    "Observe",
    "Origin",
    "Variant",
    "Weights",
    "add_observations",
    "made_subblock",
    "observed",
    "run_with",
    "subblock_weights",
    "variant_of",
    "weights_of_slot",
    "windows_of",
]
