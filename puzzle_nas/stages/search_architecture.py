"""Scores, costs and limits -> architectures (Puzzle, section 3). File: search/NAME/architecture.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from puzzle_nas.architecture_search import ArchitectureSearch, position
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import Solution, greedy, homogeneous, max_params

NAME = "search_architecture"
COMMAND = "search"
NEEDS = ("score_blocks", "measure_costs")
SETTINGS = ("search", "scenarios", "search_space")
OUTPUTS = ("search/main/architecture.json",)


def search(
    found: ArchitectureSearch, limits: dict[str, float], gap: float, time_limit_seconds: float
) -> dict[str, Any]:
    """The best architecture within the limits, and the baselines at its predicted cost or below.

    Raises:
        InfeasibleError: names each limit and the tightest value that can be reached.
    """
    problem = found.problem(limits)
    best = found.solve(limits, gap, time_limit_seconds)
    chosen = found.describe(best)
    groups = {position(layer, slot): layer for layer, slot, _ in found.space}
    slots = {position(layer, slot): slot for layer, slot, _ in found.space}
    baselines: dict[str, Callable[[], Solution]] = {
        "greedy": lambda: greedy(problem, groups),
        "homogeneous": lambda: homogeneous(problem, "runtime_ms", best.costs["runtime_ms"], groups, slots),
        "max_params": lambda: max_params(problem, "parameters", gap, time_limit_seconds),
    }
    result = {
        "limits": limits,
        **chosen,
        "status": best.status,
        "bound": best.bound,
        "gap": best.gap,
        "baselines": {},
    }
    for name, baseline in baselines.items():
        try:
            result["baselines"][name] = found.describe(baseline())
        except InfeasibleError as error:
            result["baselines"][name] = {"infeasible": str(error)}
    return result


def run(recipe: Recipe, run: RunFolder) -> None:
    """Search with the recipe's limits."""
    found = ArchitectureSearch.load(recipe, run)
    settings = recipe.search
    result = search(found, dict(settings.limits), settings.gap, settings.time_limit_seconds)
    write_json(run.architecture(), result)
