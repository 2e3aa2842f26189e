"""Costs of FFN widths that a cost table lacks: on straight lines between its own and, below them, a timed width."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from puzzle_nas.architecture import Architecture, GatedFFN, NoOpFFN, Spec
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.costs import CostTable
from puzzle_nas.engines import ENGINES
from puzzle_nas.families.loading import probe_model, shape_of
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.recipe import Recipe

NARROWEST = 32
"""The width that is timed."""
REPEATS = 7


def narrow_shares(base: RunFolder, recipe: Recipe, parent: PuzzleForCausalLM, path: Path) -> dict[int, float]:
    """Runtime of FFNs narrower than the cost table's, as a share of its narrowest one's; timed once, in stacks.

    Args:
        path: where the shares are kept.
    """
    if not path.exists():
        shape = shape_of(parent.config)
        costs = CostTable.load(base, recipe)
        narrowest = min(spec_width(name) for name in costs.data["bytes"]["variants"] if name.startswith("ffn.w"))
        stacks: dict[int, Spec] = {w: GatedFFN(w) for w in (narrowest, NARROWEST)}
        own = Architecture.of_parent(shape).layers[0]
        models = {
            str(width): probe_model(parent, Architecture(({**own, "ffn": spec},) * shape.num_hidden_layers))
            for width, spec in {**stacks, 0: NoOpFFN()}.items()
        }
        engine, steps = ENGINES[recipe.engine], recipe.costs.decode_steps_measured
        times: dict[str, list[float]] = {name: [] for name in models}
        with engine.loaded(models, path.parent / "scratch") as loaded:
            for _ in range(REPEATS):
                for name, seen in times.items():
                    parts = [s.weight * engine.time_parts(loaded[name], s, steps).total_ms(s) for s in costs.scenarios]
                    seen.append(sum(parts))
        median = {int(name): statistics.median(seen) for name, seen in times.items()}
        write_json(path, {w: (median[w] - median[0]) / (median[narrowest] - median[0]) for w in stacks})
    return {int(width): share for width, share in read_json(path).items()}


def spec_width(name: str) -> int:
    """Of a variant id of the cost table."""
    return int(name.removeprefix("ffn.w"))


def with_widths(costs: CostTable, widths: list[int], narrow: dict[int, float]) -> CostTable:
    """The table with more FFN widths: times between its own, and below them by `narrow`; bytes on their line."""

    def own(entries: dict[str, dict[str, float]]) -> dict[int, dict[str, float]]:
        return {spec_width(name): e for name, e in sorted(entries.items()) if name.startswith("ffn.w")}

    data = copy.deepcopy(dict(costs.data))
    sizes, known = data["bytes"]["variants"], own(data["bytes"]["variants"])
    for width in widths:
        fits = {f: np.polyfit(list(known), [e[f] for e in known.values()], 1) for f in next(iter(known.values()))}
        sizes.setdefault(f"ffn.w{width}", {f: round(float(np.polyval(fit, width))) for f, fit in fits.items()})
    for scenario in data["scenarios"].values():
        points = own(scenario["variants"])
        narrowest = points[min(points)]
        points |= {w: {f: share * v for f, v in narrowest.items()} for w, share in narrow.items() if w < min(points)}
        at = sorted(points)
        for width in widths:
            times = {f: float(np.interp(width, at, [points[w][f] for w in at])) for f in narrowest}
            scenario["variants"].setdefault(f"ffn.w{width}", times)
    return replace(costs, data=data)
