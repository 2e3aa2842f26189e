"""Scores, costs and limits -> architectures (Puzzle, section 3). File: search/NAME/architecture.json."""

from __future__ import annotations

import statistics
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.engines import speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import probe_model
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe

NAME = "search_architecture"
COMMAND = "search"
NEEDS = ("score_blocks", "measure_costs")
SETTINGS = ("search", "scenarios", "search_space")
OUTPUTS = ("search/main/architecture.json",)
BASELINES = ("greedy", "homogeneous", "max_params")
"""Those that every run assembles and evaluates."""


def search(
    found: ArchitectureSearch, limits: dict[str, float], gap: float, time_limit_seconds: float
) -> dict[str, Any]:
    """The best architecture within the limits, and the baselines at its predicted cost or below.

    Raises:
        InfeasibleError: names each limit and the tightest value that can be reached.
    """
    problem = found.problem(limits)
    best = found.solve(limits, gap, time_limit_seconds)
    chosen = found.describe(found.architecture(best))
    result = {
        "limits": limits,
        **chosen,
        "status": best.status,
        "bound": best.bound,
        "gap": best.gap,
        "baselines": {},
    }
    baselines = found.baselines(problem, best, gap, time_limit_seconds)
    for name in BASELINES:
        try:
            result["baselines"][name] = found.describe(found.architecture(baselines[name]()))
        except InfeasibleError as error:
            result["baselines"][name] = {"infeasible": str(error)}
    return result


VERIFY_REPEATS = 15
MARGIN = 1.005
"""How much further than the shortfall a limit is tightened."""


def verified(found: ArchitectureSearch, recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """Search until the architecture's speed-up, timed with placeholder weights beside the parent, meets the limit.

    The solver picks variants that the cost table flatters; a summed prediction of what it picks is biased.
    """
    settings = recipe.search
    asked = dict(settings.limits)
    result = search(found, asked, settings.gap, settings.time_limit_seconds)
    if "speedup" not in asked or recipe.costs.file is not None:
        return result
    parent, _ = load_parent(run)
    limit, attempts = asked["speedup"], []
    for _ in range(settings.verify_attempts):
        probe = probe_model(parent, Architecture.from_list(result["architecture"]))
        ratios = speedups(parent, probe, found.costs.scenarios, VERIFY_REPEATS, recipe.costs.decode_steps_measured)
        measured = statistics.median(ratios)
        attempts.append({"speedup_predicted": result["speedup_predicted"], "speedup_measured": measured})
        console.print(f"  predicted {result['speedup_predicted']:.3f}x, measured {measured:.3f}x")
        if measured >= asked["speedup"]:
            break
        limit *= MARGIN * asked["speedup"] / measured
        try:
            result = search(found, {**asked, "speedup": limit}, settings.gap, settings.time_limit_seconds)
        except InfeasibleError:
            console.print("  No faster child can be made of this search space.")
            break
    return {**result, "limits": asked, "verification": attempts}


def run(recipe: Recipe, run: RunFolder) -> None:
    """Search with the recipe's limits."""
    write_json(run.architecture(), verified(ArchitectureSearch.load(recipe, run), recipe, run))
