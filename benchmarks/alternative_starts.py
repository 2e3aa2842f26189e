"""How else a parent could be made faster: every method of benchmarks/alternatives.py, up to its child before GKD."""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from ffn_costs import NARROWEST, narrow_shares, with_widths

from puzzle_nas.architecture import Architecture, GatedFFN, GroupedAttention
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, write_bytes
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import Limit
from puzzle_nas.search.baselines import random_architecture
from puzzle_nas.stages import build_library
from puzzle_nas.stages.search_architecture import TRIED_ON
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.refinement import Refinement, Trials
from puzzle_nas.training.refitting import refit

SPEEDUPS = (1.5, 1.25, 2.0)
RANDOM_DRAWS = 5
INFLUENCE_TOKENS = 8_192
CONTIGUOUS_TOKENS = 2_048
WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class Place:
    """The run whose parent, text and library are used, and where what is made of them is kept."""

    base: RunFolder

    @property
    def name(self) -> str:
        """Of the run."""
        return self.base.path.name

    @property
    def folder(self) -> Path:
        """Of everything made."""
        return Path("runs/benchmark-alternatives") / self.name

    def linked(self, path: Path) -> RunFolder:
        """A run folder that shares the base run's parent and text."""
        path.mkdir(parents=True, exist_ok=True)
        for name in ("data", "parent", "parent.json"):
            if not (path / name).exists():
                (path / name).symlink_to((self.base / name).resolve())
        return RunFolder(path)


@dataclass
class Start:
    """A child before GKD."""

    model: PuzzleForCausalLM
    architecture: Architecture
    facts: dict


class Starts:
    """One parent, its library, and every method as `method(speedup)`."""

    def __init__(self, place: Place) -> None:
        self.place, self.base = place, place.base
        self.recipe = open_run(self.base)
        self.parent, self.shape = load_parent(self.base)
        self.threads = self.recipe.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        self.found = ArchitectureSearch.load(self.recipe, self.base)
        widths = list(range(NARROWEST, self.shape.intermediate_size, WIDTH_MULTIPLE))
        self.costs = with_widths(
            self.found.costs,
            widths,
            narrow_shares(self.base, self.recipe, self.parent, place.folder / "narrow.json"),
        )
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
        for layer in range(self.shape.num_hidden_layers):
            narrowed = narrowed.replaced(layer, GatedFFN(width or self.shape.intermediate_size))
        return narrowed.without(layers)

    def speedup_of(self, removed: int, width: int) -> float:
        """Predicted, of the parent with so many layers fewer and FFNs so wide."""
        block = [GroupedAttention(self.shape.num_key_value_heads), GatedFFN(width)]
        own = sum(self.costs.columns_of(spec)["runtime_ms"] for spec in block)
        left = self.shape.num_hidden_layers - removed
        return self.costs.mix_ms(self.found.parent) / (self.costs.fixed["runtime_ms"] + left * own)

    def removed_layers(self, speedup: float) -> int:
        """How many layers to remove to come nearest to a speed-up."""
        counts, width = range(1, self.shape.num_hidden_layers), self.shape.intermediate_size
        return min(counts, key=lambda n: abs(self.speedup_of(n, width) - speedup))

    def target(self, speedup: float) -> float:
        """The speed-up, nearest to `speedup`, that removing whole layers reaches."""
        return self.speedup_of(self.removed_layers(speedup), self.shape.intermediate_size)

    def width_of(self, speedup: float) -> tuple[int, int]:
        """Layers to remove, the fewest, and the largest FFN width that meet the target."""
        quarter, target = self.shape.intermediate_size // 4, self.target(speedup)
        for removed in range(self.shape.num_hidden_layers):
            for width in range(self.shape.intermediate_size, (quarter if removed else NARROWEST) - 1, -WIDTH_MULTIPLE):
                if self.speedup_of(removed, width) >= target:
                    return removed, width
        raise AssertionError("a parent of one layer")

    # methods
    @cached_property
    def influence(self) -> list[float]:
        """1 - cosine of each layer's input and output, mean over calibration tokens (ShortGPT)."""
        tokens = self.calibration[: INFLUENCE_TOKENS // self.calibration.shape[1]]
        sums, count = torch.zeros(self.shape.num_hidden_layers), 0
        with torch.inference_mode():
            for batch in tokens.to(self.parent.device).split(8):
                states = self.parent.model(batch, use_cache=False, output_hidden_states=True).hidden_states
                for i in range(len(sums)):
                    cosine = torch.nn.functional.cosine_similarity(states[i].float(), states[i + 1].float(), dim=-1)
                    sums[i] += (1 - cosine).sum().cpu()
                count += batch.numel()
        return (sums / count).tolist()

    def least_influential(self, count: int) -> list[int]:
        return sorted(sorted(range(len(self.influence)), key=self.influence.__getitem__)[:count])

    def puzzle(self, speedup: float) -> Start:
        searches = self.found.by_either_loss(self.recipe, self.base)
        refinement = Refinement(searches, self.recipe.search, self.trials)
        architecture = refinement.best({"speedup": self.target(speedup)})
        child = assemble(self.base, self.parent, architecture)
        refitted = copy.deepcopy(child)
        refit(self.parent, refitted, self.calibration, self.recipe.refit.ridge_tokens)
        kept = self.selection.compare(refitted).kl_nats < self.selection.compare(child).kl_nats
        facts = {"assembled_kl_nats": self.validation.compare(child).kl_nats, "refit_kept": kept}
        return Start(refitted if kept else child, architecture, facts)

    def greedy(self, speedup: float) -> Start:
        limits, gap, seconds = {"speedup": self.target(speedup)}, self.recipe.search.gap, 60.0
        (best,) = self.found.solve(limits, gap, seconds)
        solution = self.found.baselines(self.found.problem(limits), best, gap, seconds)["greedy"]()
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
        runs = [list(range(i, i + count)) for i in range(self.shape.num_hidden_layers - count + 1)]
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
        run = self.place.linked(self.place.folder / f"library-{initialisation}")
        settings = self.recipe.model_dump(mode="json")
        settings["threads"] = self.threads
        settings["library"]["initialisation"] = initialisation
        settings["search_space"] |= {
            "width_fractions": [w / self.shape.intermediate_size for w in widths],
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
