"""What a parent's slots may become, and which engines serve it and its children."""

from __future__ import annotations

from collections import Counter
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import FAMILIES, architecture_of
from puzzle_nas.parents import Examined
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.search_space import build_search_space
from puzzle_nas.servable import SERVERS


def may_become(examined: Examined) -> dict[str, Any]:
    """What the parent's slots may become, and which engines serve it and such children; none of a family unknown."""
    family = examined.config.model_type
    if family not in FAMILIES:
        return {"slots": {}, "served_by": {}, "not_served_by": {}}
    architecture = architecture_of(examined.config)
    kinds = kinds_by_slot(architecture)
    engines = engines_of(family, kinds)
    itself = Child(examined.model, examined.tokenizer)
    reasons = {exporter.engine: exporter.reasons(itself) for exporter in EXPORTERS.values()}
    layers = Counter(slot for _, slot, _ in architecture)
    return {
        "slots": {slot: {"layers": layers[slot], "may_become": may} for slot, may in kinds.items()},
        "served_by": {engine: engines[engine] for engine, found in reasons.items() if not found},
        "not_served_by": {engine: found for engine, found in reasons.items() if found},
    }


def kinds_by_slot(parent: Architecture) -> dict[str, list[str]]:
    """Kinds of variants that a parent offers."""
    space = build_search_space(parent, SearchSpaceSettings(windows=[1]), parent.slots, parent.slots, {})
    kinds: dict[str, dict[str, None]] = {slot: {} for slot in parent.slots}
    for layer in range(len(parent.layers)):
        for spec in space.variants(layer):
            kinds[spec.slot][spec.kind] = None
    return {slot: list(found) for slot, found in kinds.items()}


def engines_of(family: str, kinds: dict[str, list[str]]) -> dict[str, list[str]]:
    """Engines that serve children of a family, each with what it lacks: some of `kinds`, or all other sizes."""
    found = {}
    for exporter in EXPORTERS.values():
        if family in exporter.families:
            written = {spec.kind for spec in exporter.writers}
            offered = dict.fromkeys(kind for of_slot in kinds.values() for kind in of_slot)
            found[exporter.engine] = [kind for kind in offered if kind not in written]
            if family in SERVERS[exporter.server].own_layers:
                found[exporter.engine] = ["sizes but the parent's"]
    return found


def lacking(kinds: list[str]) -> str:
    """What an engine lacks, in brackets after its name."""
    return f" ({', '.join(f'no {kind}' for kind in kinds)})" if kinds else ""
