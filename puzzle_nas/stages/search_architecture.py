"""Scores, costs and limits -> architectures (Puzzle, section 3).

Files: search/NAME/architecture.json; search/main/candidates/, what was measured of each assembled child.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import timed_steps
from puzzle_nas.choosing.refinement import Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.effort import EFFORTS, GAP, SPEED_ATTEMPTS, TIME_LIMIT_SECONDS, Effort
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import load_parent, probe_model
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe

NAME = __name__.rpartition(".")[2]
BASELINES = ("greedy", "homogeneous", "max_params")
"""Those that a run assembles and evaluates; with formats the parent in each of them stands in their place."""


def search(
    found: ArchitectureSearch,
    limits: dict[str, float],
    gap: float = GAP,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
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
SPEED_REPEATS = 7
MARGIN = 1.005
"""How much further a limit is corrected than what the costs got wrong of a child."""
SLACK = 1.03
"""How much faster than asked a child may be; beyond that a nearer one is searched."""


def next_limit(asked: float, checks: Sequence[Mapping[str, float]]) -> float:
    """The predicted speed-up to search for next, so that the measured one is the asked one.

    On a straight line between a child that was too slow and one that was fast enough, the nearest of each; else by what
    the costs got wrong of the last child.
    """
    wanted = MARGIN * asked

    def nearest(fast_enough: bool) -> Mapping[str, float] | None:
        side = [check for check in checks if (check["speedup_measured"] >= wanted) == fast_enough]
        return min(side, key=lambda check: abs(check["speedup_measured"] - wanted), default=None)

    slow, fast = nearest(False), nearest(True)
    if slow and fast and slow["speedup_predicted"] < fast["speedup_predicted"]:
        share = (wanted - slow["speedup_measured"]) / (fast["speedup_measured"] - slow["speedup_measured"])
        return slow["speedup_predicted"] + share * (fast["speedup_predicted"] - slow["speedup_predicted"])
    return wanted * checks[-1]["speedup_predicted"] / checks[-1]["speedup_measured"]


def run(recipe: Recipe, run: RunFolder) -> None:
    """Search with the recipe's effort; speeds are checked where one is asked for and costs were measured here."""
    is_checked = "speedup" in recipe.search.limits and recipe.costs.file is None
    effort, attempts = EFFORTS[recipe.search.effort], SPEED_ATTEMPTS if is_checked else 0
    write_json(run.architecture(), search_measured(recipe, run, effort, attempts))


def search_measured(recipe: Recipe, run: RunFolder, effort: Effort, attempts: int) -> dict[str, Any]:
    """Search within the limits as measured: the architecture is timed with placeholder weights next to the parent.

    The limit is tightened or loosened by what the costs got wrong, until the child is as fast as asked and not much
    faster. Where children are measured, what the costs get wrong is seen of the best by sums before any is assembled.

    Args:
        attempts: how often at most what was found is timed; 0 trusts the costs.
    """
    asked = dict(recipe.search.limits)
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, asked)
    checks: list[dict[str, float]] = []

    def timed(result: dict[str, Any]) -> float:
        predicted, measured = result["speedup_predicted"], _measured_speedup(recipe, run, found, result)
        checks.append({"speedup_predicted": predicted, "speedup_measured": measured})
        console.print(f"  predicted {predicted:.3f}x, measured {measured:.3f}x")
        return measured

    def corrected() -> dict[str, float]:
        return {**asked, "speedup": next_limit(asked["speedup"], checks)}

    limits, refinement = asked, None
    if effort.measures_children:
        if attempts:
            first = search(found, asked)
            timed(first)
            limits = corrected()
        splits = {split: load_tokens(run, split) for split in TRIED_ON}
        trials = Trials(run, load_parent(recipe, run), recipe, splits, found.library)
        refinement = Refinement(found.by_either_loss(recipe, run), effort, trials)
    try:
        result = _searched(found, limits, refinement)
    except InfeasibleError:
        if limits == asked:
            raise
        limits = asked
        result = _searched(found, limits, refinement)
    fast_enough, seen = None, []
    for _ in range(attempts):
        measured = timed(result)
        seen.append(result["architecture"])
        if measured >= asked["speedup"]:
            fast_enough = result
            if measured < asked["speedup"] * SLACK:
                break
        limits = corrected()
        try:
            result = _searched(found, limits, refinement)
        except InfeasibleError:
            console.print(f"  No child is predicted to reach {limits['speedup']:.3f}x, which that would take.")
            break
        if result["architecture"] in seen:
            break
    # One nearer than a child that was faster than asked may be too slow.
    result = fast_enough or result
    tried = refinement.tried if refinement else []
    return {**result, "limits": asked, "children_measured": tried, "speed_checks": checks}


def _searched(found: ArchitectureSearch, limits: dict[str, float], refinement: Refinement | None) -> dict[str, Any]:
    result = search(found, limits)
    return result if refinement is None else result | found.describe(refinement.best(limits))


def _measured_speedup(recipe: Recipe, run: RunFolder, found: ArchitectureSearch, result: dict[str, Any]) -> float:
    parent = load_parent(recipe, run)
    probe = probe_model(parent, Architecture.from_list(result["architecture"]))
    engine, steps = ENGINES[recipe.engine], timed_steps(recipe.engine)
    with engine.loaded({"parent": parent, "child": probe}, run.scratch(NAME), recipe.kv_format) as loaded:
        return statistics.median(speedups(engine, loaded, found.costs.scenarios, SPEED_REPEATS, steps))
