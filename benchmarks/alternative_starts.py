"""How else a parent could be made faster: every method of the benchmark `alternatives`, up to its child before GKD.

For parents whose layers are all alike.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import linked, opened
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, write_bytes, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import CostTable, timed_steps
from puzzle_nas.choosing.refinement import Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.effort import EFFORTS
from puzzle_nas.engines import ENGINES
from puzzle_nas.families import Anatomy, probe_model
from puzzle_nas.library import assemble
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.search import Limit
from puzzle_nas.search.baselines import random_architecture
from puzzle_nas.specs import GatedFFN, NoOp
from puzzle_nas.stages import build_library
from puzzle_nas.stages.search_architecture import TRIED_ON
from puzzle_nas.training.refitting import refit

SPEEDUPS = (1.5, 1.25, 2.0)
RANDOM_DRAWS = 5
INFLUENCE_TOKENS = 8_192
CONTIGUOUS_TOKENS = 2_048
WIDTH_MULTIPLE = 16
NARROWEST = 32
"""The FFN width that is timed, for costs below those of the cost table."""
TIMING_REPEATS = 7


@dataclass
class Start:
    """A child before GKD."""

    model: PreTrainedModel
    architecture: Architecture
    facts: dict


def narrow_shares(found: ArchitectureSearch, recipe: Recipe, parent: PreTrainedModel, path: Path) -> dict[int, float]:
    """Runtime of FFNs narrower than the cost table's, as a share of its narrowest one's; timed once, in stacks.

    Args:
        path: where the shares are kept.
    """
    if not path.exists():
        narrowest = min(gated_widths(found.costs.data["bytes"]["variants"]))
        layers = range(len(found.parent.layers))
        models = {}
        for width in (narrowest, NARROWEST, 0):
            architecture = found.parent
            for layer in layers:
                architecture = architecture.replaced(layer, GatedFFN(width) if width else NoOp("ffn"))
            models[str(width)] = probe_model(parent, architecture)
        engine, steps = ENGINES[recipe.engine], timed_steps(recipe.engine)
        times: dict[str, list[float]] = {name: [] for name in models}
        with engine.loaded(models, path.parent / "scratch") as loaded:
            for _ in range(TIMING_REPEATS):
                for name, seen in times.items():
                    mix = found.costs.scenarios
                    seen.append(sum(s.weight * engine.time_parts(loaded[name], s, steps).total_ms(s) for s in mix))
        median = {int(name): statistics.median(seen) for name, seen in times.items()}
        shares = {w: (median[w] - median[0]) / (median[narrowest] - median[0]) for w in (narrowest, NARROWEST)}
        write_json(path, shares)
    return {int(width): share for width, share in read_json(path).items()}


def gated_widths(entries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[int, Mapping[str, float]]:
    """A cost table's entries of the first group's FFNs, by width."""
    of_group = next(iter(entries.values()))
    prefix = GatedFFN(0).id.removesuffix("0")
    return {int(name.removeprefix(prefix)): e for name, e in sorted(of_group.items()) if name.startswith(prefix)}


def with_widths(costs: CostTable, widths: Sequence[int], narrow: Mapping[int, float]) -> CostTable:
    """The table with more FFN widths: times between its own, and below them by `narrow`; bytes on their line."""
    data = copy.deepcopy(dict(costs.data))
    sizes = data["bytes"]["variants"]
    known = gated_widths(sizes)
    fits = {f: np.polyfit(list(known), [e[f] for e in known.values()], 1) for f in next(iter(known.values()))}
    of_group = next(iter(sizes.values()))
    for width in widths:
        of_group.setdefault(GatedFFN(width).id, {f: round(float(np.polyval(fit, width))) for f, fit in fits.items()})
    for scenario in data["scenarios"].values():
        points = gated_widths(scenario["variants"])
        narrowest = points[min(points)]
        points |= {w: {f: share * v for f, v in narrowest.items()} for w, share in narrow.items() if w < min(points)}
        at = sorted(points)
        of_group = next(iter(scenario["variants"].values()))
        for width in widths:
            times = {f: float(np.interp(width, at, [points[w][f] for w in at])) for f in narrowest}
            of_group.setdefault(GatedFFN(width).id, times)
    return replace(costs, data=data)


class Starts:
    """One parent, its library, and every method as `method(speedup)`.

    Args:
        folder: for what is made.
    """

    def __init__(self, base: RunFolder, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.recipe, self.parent = opened(base)
        self.found = ArchitectureSearch.load(self.recipe, self.base)
        if len(set(self.found.parent.groups)) > 1:
            raise SystemExit("The layers of this parent differ; whole layers and widths are counted here as if alike.")
        self.layers, self.width_of_parent = len(self.found.parent.layers), self.parent.config.intermediate_size
        narrow = narrow_shares(self.found, self.recipe, self.parent, folder / "narrow.json")
        widths = range(NARROWEST, self.width_of_parent, WIDTH_MULTIPLE)
        self.costs = with_widths(self.found.costs, widths, narrow)
        self.calibration = load_tokens(self.base, "calibration")

    @cached_property
    def trials(self) -> Trials:
        return Trials(self.base, self.parent, self.recipe, {s: load_tokens(self.base, s) for s in TRIED_ON})

    @cached_property
    def selection(self) -> ParentReference:
        return ParentReference(self.parent, load_tokens(self.base, "selection"))

    @cached_property
    def validation(self) -> ParentReference:
        return ParentReference(self.parent, load_tokens(self.base, "validation"))

    # speeds
    def speedup(self, architecture: Architecture) -> float:
        """Predicted."""
        return self.costs.mix_ms(self.found.parent) / self.costs.mix_ms(architecture)

    def without(self, layers: list[int], width: int | None = None) -> Architecture:
        """The parent without some layers, every remaining FFN `width` wide."""
        narrowed = self.found.parent
        for layer in range(self.layers):
            narrowed = narrowed.replaced(layer, GatedFFN(width or self.width_of_parent))
        return narrowed.without(layers)

    def speedup_of(self, removed: int, width: int) -> float:
        """Predicted, of the parent with so many layers fewer and FFNs so wide."""
        block = [self.found.parent.layers[0]["attention"], GatedFFN(width)]
        own = sum(self.costs.columns_of(0, spec)["runtime_ms"] for spec in block)
        left = self.layers - removed
        return self.costs.mix_ms(self.found.parent) / (self.costs.fixed["runtime_ms"] + left * own)

    def removed_layers(self, speedup: float) -> int:
        """How many layers to remove to come nearest to a speed-up."""
        counts, width = range(1, self.layers), self.width_of_parent
        return min(counts, key=lambda n: abs(self.speedup_of(n, width) - speedup))

    def target(self, speedup: float) -> float:
        """The speed-up, nearest to `speedup`, that removing whole layers reaches."""
        return self.speedup_of(self.removed_layers(speedup), self.width_of_parent)

    def width_of(self, speedup: float) -> tuple[int, int]:
        """Layers to remove, the fewest, and the largest FFN width that meet the target."""
        quarter, target = self.width_of_parent // 4, self.target(speedup)
        for removed in range(self.layers):
            for width in range(self.width_of_parent, (quarter if removed else NARROWEST) - 1, -WIDTH_MULTIPLE):
                if self.speedup_of(removed, width) >= target:
                    return removed, width
        raise AssertionError("a parent of one layer")

    # methods
    @cached_property
    def influence(self) -> list[float]:
        """1 - cosine of each layer's input and output, mean over calibration tokens (ShortGPT)."""
        tokens = self.calibration[: INFLUENCE_TOKENS // self.calibration.shape[1]]
        sums, count = torch.zeros(self.layers), 0
        parts = Anatomy(self.parent)
        with torch.inference_mode():
            for batch in tokens.to(self.parent.device).split(8):
                # The last of the states is after the final norm.
                *states, _ = (parts.embed(batch), *parts.states(batch, parts.inputs(batch.shape[1])))
                for i, (before, after) in enumerate(itertools.pairwise(states)):
                    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                    sums[i] += (1 - cosine).sum().cpu()
                count += batch.numel()
        return (sums / count).tolist()

    def least_influential(self, count: int) -> list[int]:
        return sorted(sorted(range(len(self.influence)), key=self.influence.__getitem__)[:count])

    def puzzle(self, speedup: float) -> Start:
        searches = self.found.by_either_loss(self.recipe, self.base)
        refinement = Refinement(searches, EFFORTS[self.recipe.search.effort], self.trials)
        architecture = refinement.best({"speedup": self.target(speedup)})
        child = assemble(self.base, self.parent, architecture)
        refitted = copy.deepcopy(child)
        refit(self.parent, refitted, self.calibration)
        kept = self.selection.compare(refitted).kl_nats < self.selection.compare(child).kl_nats
        facts = {"assembled_kl_nats": self.validation.compare(child).kl_nats, "refit_kept": kept}
        return Start(refitted if kept else child, architecture, facts)

    def greedy(self, speedup: float) -> Start:
        limits = {"speedup": self.target(speedup)}
        (best,) = self.found.solve(limits)
        solution = self.found.baselines(self.found.problem(limits), best)["greedy"]()
        return self._assembled(self.found.architecture(solution))

    def random(self, speedup: float) -> Start:
        problem = self.found.problem({"speedup": self.target(speedup)})
        (limit,) = problem.limits
        assert limit.maximum is not None
        # As slow as allowed, not merely fast enough.
        problem = replace(problem, limits=(Limit(limit.column, minimum=0.99 * limit.maximum, maximum=limit.maximum),))
        rng = np.random.default_rng(self.recipe.seed)
        drawn = [self.found.architecture(random_architecture(problem, rng)) for _ in range(RANDOM_DRAWS)]
        kl = [self.trials.kl_nats(architecture) for architecture in drawn]
        median = drawn[kl.index(statistics.median(kl))]
        return self._assembled(median, {"selection_kl_nats_of_draws": kl})

    def block_influence(self, speedup: float) -> Start:
        layers = self.least_influential(self.removed_layers(speedup))
        return self._assembled(self.without(layers), {"removed_layers": layers})

    def contiguous(self, speedup: float) -> Start:
        count = self.removed_layers(speedup)
        tokens = load_tokens(self.base, "selection")
        reference = ParentReference(self.parent, tokens[: CONTIGUOUS_TOKENS // tokens.shape[1]])
        runs = [list(range(i, i + count)) for i in range(self.layers - count + 1)]
        children = (assemble(self.base, self.parent, self.without(layers)) for layers in runs)
        kl = [reference.compare(child).kl_nats for child in children]
        layers = runs[kl.index(min(kl))]
        return self._assembled(self.without(layers), {"removed_layers": layers, "selection_kl_nats_of_runs": kl})

    def width(self, speedup: float) -> Start:
        return self._narrowed("paper", speedup)

    def width_refitted(self, speedup: float) -> Start:
        return self._narrowed("least_squares", speedup)

    def _narrowed(self, initialisation: str, speedup: float) -> Start:
        widths = sorted({self.width_of(s)[1] for s in SPEEDUPS})
        run = linked(self.base, self.folder / f"library-{initialisation}")
        settings = self.recipe.model_dump(mode="json")
        settings["threads"] = torch.get_num_threads()
        settings["library"]["initialisation"] = initialisation
        settings["search_space"] |= {
            "width_fractions": [w / self.width_of_parent for w in widths],
            "multiple_of": WIDTH_MULTIPLE,
            "attention_linear": False,
            "ffn_linear": False,
        }
        recipe = Recipe.model_validate(settings)
        write_bytes(run.recipe, recipe.to_yaml().encode())
        build_library.run(recipe, run)
        if not (run / "library/main").exists():
            (run / "library/main").symlink_to("initial")
        removed, width = self.width_of(speedup)
        layers = self.least_influential(removed)
        architecture = self.without(layers, width)
        facts = {"intermediate_size": width, "removed_layers": layers}
        return Start(assemble(run, self.parent, architecture), architecture, facts)

    def _assembled(self, architecture: Architecture, facts: dict | None = None) -> Start:
        return Start(assemble(self.base, self.parent, architecture), architecture, facts or {})
