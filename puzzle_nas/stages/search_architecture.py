"""Scores, costs and limits -> architectures (Puzzle, section 3).

Files: search/NAME/architecture.json; search/main/candidates/, what was measured of each assembled child.
"""

from __future__ import annotations

import statistics
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.refinement import Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import load_parent, probe_model
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe, SearchSettings

NAME = __name__.rpartition(".")[2]
BASELINES = ("greedy", "homogeneous", "max_params")
"""Those that a run assembles and evaluates; with formats the parent in each of them stands in their place."""


def search(
    found: ArchitectureSearch, limits: dict[str, float], gap: float, time_limit_seconds: float
) -> dict[str, Any]:
    """The program's best architecture within the limits, and the baselines at its predicted cost or below.

    `architecture` and what is predicted of it may later become another child's; `program` stays.

    Raises:
        InfeasibleError: names each limit and the tightest value that can be reached.
    """
    problem = found.problem(limits)
    (best,) = found.solve(limits, gap, time_limit_seconds)
    chosen = found.describe(found.architecture(best))
    result = {
        "library": found.library,
        "limits": limits,
        "scenarios": [s.name for s in found.costs.scenarios],
        **chosen,
        "program": {**chosen, "status": best.status, "bound": best.bound, "gap": best.gap},
        "baselines": {},
    }
    baselines = found.baselines(problem, best, gap, time_limit_seconds)
    for name in () if found.space.quantised_parents else BASELINES:
        try:
            result["baselines"][name] = found.describe(found.architecture(baselines[name]()))
        except InfeasibleError as error:
            result["baselines"][name] = {"infeasible": str(error)}
    result["baselines"] |= {name: found.describe(parent) for name, parent in found.space.quantised_parents.items()}
    return result


TRIED_ON = ("calibration", "scoring", "selection")
"""The splits that candidates are refitted and measured on."""
SPEED_REPEATS = 15
MARGIN = 1.005
"""How much further a limit is corrected than what the costs got wrong of a child."""
SLACK = 1.03
"""How much faster than asked a child may be; beyond that a nearer one is searched."""


def run(recipe: Recipe, run: RunFolder) -> None:
    """Search within the limits as measured: the architecture is timed with placeholder weights next to the parent.

    The limit is tightened or loosened by what the costs got wrong, until the child is as fast as asked and not much
    faster.
    """
    settings, asked = recipe.search, dict(recipe.search.limits)
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, asked)
    attempts = settings.speed_attempts if "speedup" in asked and recipe.costs.file is None else 0
    checks: list[dict[str, float]] = []

    def timed(result: dict[str, Any]) -> float:
        predicted, measured = result["speedup_predicted"], _measured_speedup(recipe, run, found, result)
        checks.append({"speedup_predicted": predicted, "speedup_measured": measured})
        console.print(f"  predicted {predicted:.3f}x, measured {measured:.3f}x")
        return measured

    def corrected(result: dict[str, Any], measured: float) -> dict[str, float]:
        return {**asked, "speedup": asked["speedup"] * MARGIN * result["speedup_predicted"] / measured}

    limits, refinement = asked, None
    if settings.measures_children:
        if attempts:
            # What the costs get wrong of such children, before any is assembled.
            first = search(found, asked, settings.gap, settings.time_limit_seconds)
            limits = corrected(first, timed(first))
        splits = {split: load_tokens(run, split) for split in TRIED_ON}
        trials = Trials(run, load_parent(recipe, run), recipe, splits, found.library)
        refinement = Refinement(found.by_either_loss(recipe, run), settings, trials)
    try:
        result = _searched(found, settings, limits, refinement)
    except InfeasibleError:
        if limits == asked:
            raise
        limits = asked
        result = _searched(found, settings, limits, refinement)
    fast_enough, seen = None, []
    for _ in range(attempts):
        measured = timed(result)
        seen.append(result["architecture"])
        if measured >= asked["speedup"]:
            fast_enough = result
            if measured < asked["speedup"] * SLACK:
                break
        limits = corrected(result, measured)
        try:
            result = _searched(found, settings, limits, refinement)
        except InfeasibleError:
            console.print("  No faster child can be made of this search space.")
            break
        if result["architecture"] in seen:
            break
    # One nearer than a child that was faster than asked may be too slow.
    result = fast_enough or result
    tried = refinement.tried if refinement else []
    write_json(run.architecture(), {**result, "limits": asked, "children_measured": tried, "speed_checks": checks})


def _searched(
    found: ArchitectureSearch, settings: SearchSettings, limits: dict[str, float], refinement: Refinement | None
) -> dict[str, Any]:
    result = search(found, limits, settings.gap, settings.time_limit_seconds)
    return result if refinement is None else result | found.describe(refinement.best(limits))


def _measured_speedup(recipe: Recipe, run: RunFolder, found: ArchitectureSearch, result: dict[str, Any]) -> float:
    parent = load_parent(recipe, run)
    probe = probe_model(parent, Architecture.from_list(result["architecture"]))
    engine, steps = ENGINES[recipe.engine], recipe.costs.decode_steps_measured
    with engine.loaded({"parent": parent, "child": probe}, run.scratch(NAME)) as loaded:
        return statistics.median(speedups(engine, loaded, found.costs.scenarios, SPEED_REPEATS, steps))
