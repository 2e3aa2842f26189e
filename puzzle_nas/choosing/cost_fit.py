"""Costs of single variants from the times of whole models. No torch.

The time of a model is taken as that of a model without sub-blocks plus one part for each sub-block. Timing each
variant in a stack of its like would give those parts by subtraction, but sub-blocks do not add up that way: beside
nothing, in a cool cache, or next to an even neighbour, they run at other speeds than in a mixture. So random mixtures
are timed too, and the parts are what explains all times best.

What a format saves is taken as proportional to the weights that it stores: one saving for each slot and format, which
a narrower variant has a share of. So not every variant has to be timed in every format.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_nas.architecture import Architecture
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import Head, NoOp, Spec

EMPTY = "empty"
"""Name of the model without sub-blocks: embeddings, final norm and LM head."""
KEPT_LAYERS = (2, 4)
"""Where engines remove nothing but whole layers, and not all: the first of so many parts of the parent is left, as
what some compute in a layer follows from its number."""
PARENT = "parent"
PARENT_WEIGHT = 4.0
"""The parent's time counts this much more than another model's: every speed-up is relative to it."""


@dataclass(frozen=True)
class Part:
    """A variant in the layers of one group: these cost the same."""

    group: int
    """The first of the layers; of the head their number."""
    spec: Spec


def parts_of(space: SearchSpace) -> list[Part]:
    """All that has a cost of its own, the removal of every slot and the head included."""
    groups = space.parent.groups
    parts = [Part(groups[layer], spec) for layer, _, spec in space]
    parts += [Part(groups[layer], NoOp(slot)) for layer, slot, _ in space.parent]
    parts += [Part(len(groups), head) for head in space.heads]
    return list(dict.fromkeys(parts))


def uniform_models(space: SearchSpace, whole_layers: bool = False) -> dict[str, Architecture]:
    """The parent, in each format too, `EMPTY`, and by part the parent with that variant in every layer of its group.

    Formats are those of the parent's own sub-blocks only.

    Args:
        whole_layers: nothing smaller can be removed: the parent with fewer layers instead of `EMPTY`.
    """
    parent = space.parent
    layers = range(len(parent.layers))
    fewer = {f"first part of {n}": parent.without(layers[math.ceil(len(layers) / n) :]) for n in KEPT_LAYERS}
    models = {**(fewer if whole_layers else {EMPTY: parent.without(layers)}), PARENT: parent}
    for part in parts_of(space):
        if whole_layers and part.spec.empty:
            continue
        if part.spec.format and part.spec.plain != space.own(part.group, part.spec.slot):
            continue
        architecture = parent.replaced(part.group, part.spec) if isinstance(part.spec, Head) else parent
        for layer in _members(parent, part.group):
            architecture = architecture.replaced(layer, part.spec)
        if architecture != parent:
            models[stack_name(part)] = architecture
    return models | space.quantised_parents


def stack_name(part: Part) -> str:
    """What the model with that variant in every layer of its group is called."""
    return f"{part.group}:{part.spec.id}"


def _members(parent: Architecture, group: int) -> list[int]:
    return [layer for layer, first in enumerate(parent.groups) if first == group]


def random_mixtures(space: SearchSpace, count: int, seed: int, whole_layers: bool = False) -> dict[str, Architecture]:
    """Architectures between the parent and one that kept nothing of it: each keeps a random share of its sub-blocks.

    Args:
        whole_layers: nothing smaller can be removed: no layer is.
    """
    draw = random.Random(seed)
    groups = space.parent.groups
    others: dict[tuple[int, str], list[Spec]] = {}
    for part in parts_of(space):
        others.setdefault((part.group, part.spec.slot), []).append(part.spec)

    def chosen(layer: int, own: Spec, kept_share: float) -> Spec:
        every = others[groups[layer], own.slot]
        alternatives = [spec for spec in every if spec != own and spec.format is None]
        if whole_layers:
            alternatives = [spec for spec in alternatives if not spec.empty] or [own]
        plain = own if draw.random() < kept_share else draw.choice(alternatives)
        stored = [spec for spec in every if spec.plain == plain]
        return draw.choice(stored) if len(stored) > 1 else plain

    mixtures = {}
    for number in range(count):
        kept_share = draw.random()
        mixtures[f"mixture {number}"] = Architecture(
            tuple(
                {slot: chosen(layer, own, kept_share) for slot, own in block.items()}
                for layer, block in enumerate(space.parent.layers)
            ),
            draw.choice(space.heads),
        )
    return mixtures


@dataclass(frozen=True)
class Saving:
    """What a format takes off the cost of a parent's own sub-block, or of the head."""

    group: int
    slot: str
    format: str


@dataclass(frozen=True)
class CostFit:
    """Additive costs of one kind of time, in the unit of the times they were fitted to."""

    fixed: float
    parts: dict[Part, float]
    """What is empty by nature costs nothing. Heads are relative to the fastest one, which `fixed` contains."""
    relative_errors: dict[str, float]
    """Predicted over measured, less 1, of every model when the fit is made without it."""


def fit(
    architectures: Mapping[str, Architecture],
    times: Mapping[str, float],
    sizes: Mapping[Part, float] | None = None,
) -> CostFit:
    """The additive costs that explain the models' times with the least squared relative error; none is negative.

    What no two models tell apart, such as attention and FFN where neither is left out alone, is divided by size.

    Args:
        architectures: among them `PARENT`; and `EMPTY`, whose time is the fixed part, which is fitted too without it.
        sizes: for each part that has a cost, the weights in its matrices. None means that there are no formats, that
            all are of one size, and that all have a cost that the models have.
    """
    shares = None if sizes is None else _shares(architectures[PARENT], sizes)
    names = [name for name in architectures if name != EMPTY]
    groups = architectures[PARENT].groups
    counted = {name: _counts(architectures[name], groups, shares or {}) for name in names}
    every = list(dict.fromkeys(term for name in names for term in counted[name]))
    asked = shares or {term: 1.0 for term in every if isinstance(term, Part)}
    measured = np.array([times[name] for name in names])
    if not measured.all():
        return CostFit(times.get(EMPTY, 0.0), dict.fromkeys(asked, 0.0), dict.fromkeys(names, 0.0))
    weights = np.where(np.array(names) == PARENT, PARENT_WEIGHT, 1.0) / measured
    present = [term for term in every if isinstance(term, Saving) or not term.spec.empty]
    fixed = [] if EMPTY in times else [1.0]
    while True:
        counts = np.array([[counted[name][term] for term in present] + fixed for name in names])
        # The pseudo-inverse gives what is not told apart the smallest values; in these units, in proportion to size.
        units = np.array([_unit(term, sizes) for term in present] + fixed)
        inverse = units[:, None] * np.linalg.pinv(counts * weights[:, None] * units)
        values = inverse @ ((measured - times.get(EMPTY, 0.0)) * weights)
        negative = [t for t, value in zip(present, values, strict=False) if value < 0 and isinstance(t, Part)]
        if not negative:
            break
        present = [term for term in present if term not in negative]
    leverage = np.einsum("ij,ji->i", counts * weights[:, None], inverse)
    outside = values[-1] if fixed else times[EMPTY]
    errors = ((times.get(EMPTY, 0.0) + counts @ values) / measured - 1) / np.maximum(1 - leverage, 1e-9)
    found = dict.fromkeys(every, 0.0) | dict(zip(present, map(float, values), strict=False))
    parts = {part: _cost(part, found, share) for part, share in asked.items()}
    heads = [part for part in parts if isinstance(part.spec, Head)]
    fastest = min((parts[part] for part in heads), default=0.0)
    parts |= {part: parts[part] - fastest for part in heads}
    return CostFit(float(outside) + fastest, parts, dict(zip(names, map(float, errors), strict=True)))


def _shares(parent: Architecture, sizes: Mapping[Part, float]) -> dict[Part, float]:
    """By part, its size relative to that of the parent's own sub-block."""
    own = {part: sizes[Part(part.group, parent.at(part.group, part.spec.slot))] for part in sizes}
    return {part: size / own[part] if own[part] else 1.0 for part, size in sizes.items()}


def _unit(term: Part | Saving, sizes: Mapping[Part, float] | None) -> float:
    """Of a cost, so that costs of equally many such units are in proportion to the size of their parts."""
    return math.sqrt(sizes[term] or 1.0) if sizes is not None and isinstance(term, Part) else 1.0


def _counts(
    architecture: Architecture, groups: Sequence[int], shares: Mapping[Part, float]
) -> Mapping[Part | Saving, float]:
    """How often a model has each variant, and how much of each saving."""
    counts: dict[Part | Saving, float] = defaultdict(float)
    for layer, _, spec in architecture:
        counts[Part(groups[layer], spec.plain)] += 1
    parts = [Part(groups[layer], spec) for layer, _, spec in architecture]
    for part in [*parts, Part(len(groups), architecture.head)]:
        if part.spec.format:
            counts[Saving(part.group, part.spec.slot, part.spec.format)] += shares[part]
    return counts


def _cost(part: Part, found: Mapping[Part | Saving, float], share: float) -> float:
    spec = part.spec
    plain = found.get(Part(part.group, spec.plain), 0.0)
    if spec.format is None:
        return plain
    cost = plain + share * found.get(Saving(part.group, spec.slot, spec.format), 0.0)
    return cost if isinstance(spec, Head) else max(0.0, cost)
