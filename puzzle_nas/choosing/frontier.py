"""A whole range of limits: the best child at each, and what the baselines reach (Puzzle, figure 5). No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from puzzle_nas.architecture import Architecture
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.errors import InfeasibleError, PuzzleError, RecipeError, SearchTimeoutError
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import Limit, Solution, random_architecture, solve

NUM_LIMITS = 12
SLOWEST = 1.05
"""Speed-up at which the default range starts."""
NUM_RANDOM = 5
"""Random children at each limit."""


@dataclass(frozen=True)
class LimitRange:
    """One limit, and the values that it takes in turn."""

    name: str
    values: tuple[float, ...]

    @classmethod
    def between(cls, name: str, first: float, last: float, count: int = NUM_LIMITS) -> LimitRange:
        """`count` values in equal ratios, both ends included."""
        return cls(name, tuple(float(value) for value in np.geomspace(first, last, count)))

    @classmethod
    def parse(cls, text: str) -> LimitRange:
        """From NAME=FROM:TO or NAME=FROM:TO:COUNT.

        Raises:
            RecipeError: written otherwise, or values out of range.
        """
        name, _, numbers = text.partition("=")
        try:
            first, last, count = (*numbers.split(":"), str(NUM_LIMITS))[:3]
            ends, steps = (float(first), float(last)), int(count)
            if not all(0 < end < math.inf for end in ends) or steps < 2 or numbers.count(":") > 2:
                raise ValueError
        except ValueError:
            raise RecipeError(
                f"'{text}' is not a range of limits; write NAME=FROM:TO or NAME=FROM:TO:COUNT with positive numbers "
                "and a count from 2 up, such as speedup=1.1:2:10."
            ) from None
        return cls.between(name, *ends, steps)


def fastest(found: ArchitectureSearch, limits: dict[str, float], column: str = "runtime_ms") -> Architecture:
    """The child within the limits whose sum of a column of times is least.

    Raises:
        InfeasibleError: nothing meets the limits.
    """
    found.solve(limits)
    (solution,) = solve(replace(found.problem(limits), objective=column))
    return found.architecture(solution)


def reachable_speedups(found: ArchitectureSearch, limits: dict[str, float]) -> LimitRange:
    """From 1.05x to the speed-up of the fastest child within the other limits.

    Raises:
        InfeasibleError: nothing meets those, or no child is that fast.
    """
    speedup = found.describe(fastest(found, limits))["speedup_predicted"]
    if speedup <= SLOWEST:
        raise InfeasibleError(
            f"The fastest child of this search space is predicted at {speedup:.3f}x; offer cheaper variants, "
            "or name another range with --limit-range."
        )
    # The last limit is the speed-up of a choice: a hair below it, or rounding would rule that choice out.
    return LimitRange.between("speedup", SLOWEST, speedup * (1 - 1e-9))


def solve_frontier(
    recipe: Recipe, found: ArchitectureSearch, limit_range: LimitRange | None = None, with_baselines: bool = True
) -> dict[str, Any]:
    """The best child and the baselines at every limit of a range, as JSON.

    The recipe's other limits hold throughout. A row is one model at one limit: `describe` of it, or why there is
    none. The baselines are those of `ArchitectureSearch.baselines`, and `random`: choices for scores drawn at
    random, within the limits and at most 1 % faster than the child (without that, they would be far faster).

    Args:
        limit_range: None means from 1.05x to the largest speed-up that can be reached.
        with_baselines: without them only the child's rows.

    Raises:
        InfeasibleError: no limit of the range can be met.
        RecipeError: a limit that is not known.
    """
    ranged = limit_range.name if limit_range else "speedup"
    others = {name: value for name, value in recipe.search.limits.items() if name != ranged}
    limit_range = limit_range or reachable_speedups(found, others)
    rows: list[dict[str, Any]] = []
    failure: PuzzleError | None = None
    with progress("frontier, limit", len(limit_range.values)) as ticker:
        for index, value in enumerate(limit_range.values):
            limits = {**others, limit_range.name: value}
            try:
                (child,) = found.solve(limits)
            except (InfeasibleError, SearchTimeoutError) as error:
                failure = error
                rows.append({"model": "child", "limit": value, "infeasible": str(error)})
            else:
                rows.append(
                    {"model": "child", "limit": value, **found.describe(found.architecture(child)), "gap": child.gap}
                )
                baselines = _baselines(recipe, found, limits, child, index) if with_baselines else []
                for model, baseline in baselines:
                    rows.append({"model": model, "limit": value, **_described(found, baseline)})
            ticker.advance()
    if failure is not None and all("infeasible" in row for row in rows):
        raise failure
    return {
        "limit": limit_range.name,
        "values": list(limit_range.values),
        "other_limits": others,
        "metric": recipe.scoring.metric,
        "rows": rows,
    }


def _baselines(
    recipe: Recipe, found: ArchitectureSearch, limits: dict[str, float], child: Solution, index: int
) -> list[tuple[str, Callable[[], Solution]]]:
    problem = found.problem(limits)
    as_slow = Limit("runtime_ms", minimum=0.99 * child.costs["runtime_ms"])
    alike = replace(problem, limits=(*problem.limits, as_slow))
    draws = [np.random.default_rng([recipe.seed, index, draw]) for draw in range(NUM_RANDOM)]
    return [
        *found.baselines(problem, child).items(),
        *(("random", lambda rng=rng: random_architecture(alike, rng)) for rng in draws),
    ]


def _described(found: ArchitectureSearch, baseline: Callable[[], Solution]) -> dict[str, Any]:
    try:
        return found.describe(found.architecture(baseline()))
    except (InfeasibleError, SearchTimeoutError) as error:
        return {"infeasible": str(error)}
