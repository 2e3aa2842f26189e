"""Scores, costs and limits -> architectures (Puzzle, section 3). File: search/NAME/architecture.json.

A position is one slot of one layer; its options are the variants with their scores and costs. The summed scores
estimate the child's damage, the summed costs predict its costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puzzle_nas.architecture import SLOTS, Architecture, ParentShape, SearchSpace, Spec
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.costs import CostTable
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.library import search_space_of
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import InfeasibleLimitsError, Problem, Solution, Table, greedy, homogeneous, max_params, solve

NAME = "search_architecture"
COMMAND = "search"
NEEDS = ("score_blocks", "measure_costs")
SETTINGS = ("search", "scenarios", "search_space")
OUTPUTS = ("search/main/architecture.json",)


def position(layer: int, slot: str) -> str:
    """A position's label in tables."""
    return f"{layer:02d}.{slot}"


@dataclass(frozen=True)
class ArchitectureSearch:
    """One run's tables as a search problem."""

    space: SearchSpace
    shape: ParentShape
    costs: CostTable
    scores: dict[tuple[int, str], float]
    """Damage by layer and variant id; the parent's own is 0."""

    @classmethod
    def load(cls, recipe: Recipe, run: RunFolder) -> ArchitectureSearch:
        """From the run's library scores and cost table."""
        shape = ParentShape(**read_json(run.parent, "prepare-parent")["shape"])
        space = search_space_of(recipe, shape)
        scores: dict[tuple[int, str], float] = {}
        metric = recipe.scoring.metric
        field = "kl_nats" if metric == "kl" else "lm_loss_increase_nats"
        for layer, slot, spec in space:
            is_parent = spec == shape.parent_spec(slot)
            path = run.score(layer, spec.id, metric=metric)
            scores[layer, spec.id] = 0.0 if is_parent else read_json(path, "score-blocks")[field]["mean"]
        return cls(space, shape, CostTable.load(run, recipe), scores)

    @property
    def parent(self) -> Architecture:
        """Every layer as in the parent."""
        return Architecture.of_parent(self.shape)

    def problem(self, limits: dict[str, float]) -> Problem:
        """Minimise the summed score within the limits."""
        rows = [
            {
                "layer": position(layer, slot),
                "variant": spec.id,
                "score": self.scores[layer, spec.id],
                **self.costs.columns_of(spec),
            }
            for layer, slot, spec in self.space
        ]
        bounds = tuple(self.costs.limits(limits, self.parent))
        return Problem(Table.from_rows(rows), "score", limits=bounds, fixed=self.costs.fixed)

    def architecture(self, solution: Solution) -> Architecture:
        """The chosen variants as an architecture."""
        specs: dict[tuple[int, str], Spec] = {(layer, spec.id): spec for layer, _, spec in self.space}
        layers = range(self.shape.num_hidden_layers)
        return Architecture(
            tuple({slot: specs[i, solution.choices[position(i, slot)]] for slot in SLOTS} for i in layers)
        )

    def describe(self, solution: Solution) -> dict[str, Any]:
        """A solution as JSON."""
        architecture = self.architecture(solution)
        return {
            "architecture": architecture.to_list(),
            "score_sum": sum(self.scores[layer, spec.id] for layer, _, spec in architecture),
            "speedup_predicted": self.costs.mix_ms(self.parent) / self.costs.mix_ms(architecture),
            "runtime_ms_predicted": self.costs.mix_ms(architecture),
            "memory_bytes": self.costs.memory_bytes(architecture),
            "parameters": self.costs.parameters(architecture),
        }


def search(found: ArchitectureSearch, limits: dict[str, float], gap: float, time_limit_seconds: float) -> dict[str, Any]:
    """The best architecture within the limits, and the baselines at its predicted cost or below.

    Raises:
        InfeasibleError: names each limit and the tightest value that can be reached.
    """
    problem = found.problem(limits)
    try:
        best = solve(problem, gap=gap, time_limit_seconds=time_limit_seconds)[0]
    except InfeasibleLimitsError as error:
        raise InfeasibleError(_explain(found, limits, error)) from error
    chosen = found.describe(best)
    groups = {position(layer, slot): layer for layer, slot, _ in found.space}
    slots = {position(layer, slot): slot for layer, slot, _ in found.space}
    baselines: dict[str, Callable[[], Solution]] = {
        "greedy": lambda: greedy(problem, groups),
        "homogeneous": lambda: homogeneous(problem, "runtime_ms", best.costs["runtime_ms"], groups, slots),
        "max_params": lambda: max_params(problem, "parameters", gap, time_limit_seconds),
    }
    result = {"limits": limits, **chosen, "status": best.status, "bound": best.bound, "gap": best.gap, "baselines": {}}
    for name, baseline in baselines.items():
        try:
            result["baselines"][name] = found.describe(baseline())
        except InfeasibleError as error:
            result["baselines"][name] = {"infeasible": str(error)}
    return result


def _explain(found: ArchitectureSearch, limits: dict[str, float], error: InfeasibleLimitsError) -> str:
    owner: dict[str, list[str]] = {}
    for name, value in limits.items():
        for bound in found.costs.limits({name: value}, found.parent):
            owner.setdefault(f"{bound.column}<={bound.maximum}", []).append(name)
    parts = []
    for report in error.reports:
        for name in owner.get(f"{report.column}<={report.asked}", []):
            alone = found.costs.reachable(name, report.reachable_alone, found.parent, report.column)
            text = f"{name}={limits[name]:g} can reach {alone:.4g}"
            if len(error.reports) > 1:
                others = report.reachable_with_others
                text += " alone" + (
                    "" if others is None
                    else f" and {found.costs.reachable(name, others, found.parent, report.column):.4g} while the others hold"
                )
            parts.append(text)
    return f"No child of this search space meets the limits: {'; '.join(parts)}. Loosen a limit or offer cheaper variants."


def run(recipe: Recipe, run: RunFolder) -> None:
    """Search with the recipe's limits."""
    found = ArchitectureSearch.load(recipe, run)
    settings = recipe.search
    result = search(found, dict(settings.limits), settings.gap, settings.time_limit_seconds)
    write_json(run.architecture(), result)
