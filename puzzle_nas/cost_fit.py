"""Costs of single variants from the times of whole models. No torch.

The time of a model is taken as that of a model without sub-blocks plus one part for each sub-block. Timing each
variant in a stack of its like would give those parts by subtraction, but sub-blocks do not add up that way: beside
nothing, in a cool cache, or next to an even neighbour, they run at other speeds than in a mixture. So random mixtures
are timed too, and the parts are what explains all times best.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_nas.architecture import SLOTS, Architecture, NoOpAttention, NoOpFFN, ParentShape, Spec

EMPTY = "empty"
"""Name of the model without sub-blocks: embeddings, final norm and LM head."""
PARENT_WEIGHT = 4.0
"""The parent's time counts this much more than another model's: every speed-up is relative to it."""


def uniform_models(shape: ParentShape, specs: Sequence[Spec]) -> dict[str, Architecture]:
    """By variant id, the parent with that variant in every layer; "parent" itself, and `EMPTY`."""
    parent = {slot: shape.parent_spec(slot) for slot in SLOTS}
    nothing: dict[str, Spec] = {"attention": NoOpAttention(), "ffn": NoOpFFN()}
    blocks = {EMPTY: nothing, "parent": parent} | {s.id: {**parent, s.slot: s} for s in specs if s != parent[s.slot]}
    return {name: Architecture((block,) * shape.num_hidden_layers) for name, block in blocks.items()}


def random_mixtures(shape: ParentShape, specs: Sequence[Spec], count: int, seed: int) -> dict[str, Architecture]:
    """Architectures between the parent and one that kept nothing of it: each keeps a random share of its sub-blocks."""
    draw = random.Random(seed)
    others = {slot: [s for s in specs if s.slot == slot and s != shape.parent_spec(slot)] for slot in SLOTS}

    def block(kept_share: float) -> dict[str, Spec]:
        return {
            slot: shape.parent_spec(slot) if draw.random() < kept_share else draw.choice(others[slot]) for slot in SLOTS
        }

    mixtures = {}
    for number in range(count):
        kept_share = draw.random()
        mixtures[f"mixture {number}"] = Architecture(tuple(block(kept_share) for _ in range(shape.num_hidden_layers)))
    return mixtures


@dataclass(frozen=True)
class CostFit:
    """Additive costs of one kind of time, in the unit of the times they were fitted to."""

    fixed: float
    variants: dict[str, float]
    """By variant id; what is empty by nature costs nothing."""
    relative_errors: dict[str, float]
    """Predicted over measured, less 1, of every model when the fit is made without it."""


def fit(architectures: Mapping[str, Architecture], times: Mapping[str, float]) -> CostFit:
    """The additive costs that explain the models' times with the least squared relative error; none is negative.

    The fixed part is the time of `EMPTY`.
    """
    names = [name for name in architectures if name != EMPTY]
    fixed = times[EMPTY]
    variants = list(dict.fromkeys(spec for name in names for _, _, spec in architectures[name]))
    present = [spec.id for spec in variants if not spec.empty]
    measured = np.array([times[name] for name in names])
    costs = {spec.id: 0.0 for spec in variants}
    if not measured.all():
        return CostFit(fixed, costs, dict.fromkeys(names, 0.0))
    weights = np.where(np.array(names) == "parent", PARENT_WEIGHT, 1.0) / measured
    while True:
        counts = np.array([[_count(architectures[name], id) for id in present] for name in names])
        inverse = np.linalg.pinv(counts * weights[:, None])
        parts = inverse @ ((measured - fixed) * weights)
        negative = [id for id, part in zip(present, parts, strict=True) if part < 0]
        if not negative:
            break
        present = [id for id in present if id not in negative]
    leverage = np.einsum("ij,ji->i", counts * weights[:, None], inverse)
    errors = ((fixed + counts @ parts) / measured - 1) / np.maximum(1 - leverage, 1e-9)
    costs |= dict(zip(present, map(float, parts), strict=True))
    return CostFit(fixed, costs, dict(zip(names, map(float, errors), strict=True)))


def _count(architecture: Architecture, variant: str) -> int:
    return sum(spec.id == variant for _, _, spec in architecture)
