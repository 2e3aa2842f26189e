"""The search as a mixed-integer program (Puzzle, section 3), checked in exact arithmetic.

    minimise    sum_ij score_ij x_ij
    subject to  sum_j x_ij = 1                                         for every position i
                minimum <= fixed + sum_ij cost_ij x_ij <= maximum      for every limit
                sum_i x_i,earlier(i) <= positions - min_different      for every earlier solution

When variants span several positions, the first line is an exact cover of the chain.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from puzzle_nas.effort import GAP, TIME_LIMIT_SECONDS
from puzzle_nas.errors import InfeasibleError, RecipeError, SearchTimeoutError
from puzzle_nas.search.infeasible import explain_infeasible
from puzzle_nas.search.problem import Problem, Solution
from puzzle_nas.search.program import Program, build_program, choices_of
from puzzle_nas.search.solver import Answer, differing, optimise


class FewerSolutionsError(InfeasibleError):
    """No further choice differs enough from the earlier solutions; `solutions` holds those."""

    def __init__(self, message: str, solutions: list[Solution]):
        super().__init__(message)
        self.solutions = solutions


def solve(
    problem: Problem,
    gap: float = GAP,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    num_solutions: int = 1,
    min_different: int = 1,
) -> list[Solution]:
    """The best choices within the limits, best first (Puzzle, section 3).

    Limits are met exactly, in the arithmetic of fractions. What differs by less than about 1e-9 of a column's
    range is beyond the solver: of choices so close to a limit, or so close in score, it may miss the better.

    Args:
        gap: relative distance to the bound at which a solution counts as optimal; 0 asks for a proof.
        time_limit_seconds: for each solution; the best found by then is returned with its gap.
        num_solutions: how many to return.
        min_different: positions in which each must differ from every earlier one.

    Raises:
        InfeasibleLimitsError: nothing meets the limits; the message and `reports` say what can be reached.
        FewerSolutionsError: fewer than `num_solutions` differ enough.
        SearchTimeoutError: the time was up before any choice was found.
        RecipeError: arguments out of range.
    """
    if not (gap >= 0 and time_limit_seconds > 0 and num_solutions >= 1 and min_different >= 1):
        raise RecipeError(
            "A search needs gap >= 0, time_limit_seconds > 0, num_solutions >= 1 and min_different >= 1; "
            f"given {gap}, {time_limit_seconds}, {num_solutions} and {min_different}."
        )
    program = build_program(problem)
    solutions: list[Solution] = []
    while len(solutions) < num_solutions:
        started = time.perf_counter()
        offset = _signed(problem, float(problem.fixed.get(problem.objective, 0.0)))
        answer = optimise(program, gap, offset, time.monotonic() + time_limit_seconds)
        if answer.path is None and answer.bound < math.inf:
            raise SearchTimeoutError(
                f"The search found no{' further' if solutions else ''} choice within the limits in "
                f"{time_limit_seconds:g} s; raise the time limit or loosen a limit."
            )
        if answer.path is None and solutions:
            raise FewerSolutionsError(
                f"Only {len(solutions)} of {num_solutions} solutions were found that differ from the earlier "
                f"ones in {min_different} positions; ask for fewer solutions or fewer differences.",
                solutions,
            )
        if answer.path is None:
            raise explain_infeasible(problem, time_limit_seconds)
        solutions.append(_solution(problem, program, answer, gap, offset, time.perf_counter() - started))
        program = replace(program, rows=(*program.rows, differing(program, answer.path, min_different)))
    return solutions


def _signed(problem: Problem, value: float) -> float:
    return value if problem.sense == "minimise" else -value


def _solution(
    problem: Problem, program: Program, answer: Answer, gap: float, offset: float, seconds: float
) -> Solution:
    assert answer.path is not None
    choices = choices_of(problem, program, answer.path)
    costs = problem.costs(choices)
    score = costs[problem.objective]
    if answer.bound == -math.inf:
        return Solution(choices, score, None, None, costs, "feasible", seconds)
    rounding = 1e-15 * len(answer.path) * float(np.abs(program.cost[answer.path]).max())
    proven = answer.bound >= program.score(answer.path) - rounding
    bound = score if proven else _signed(problem, min(answer.bound + offset, _signed(problem, score)))
    relative = abs(score - bound) / (max(abs(score), abs(bound)) or 1.0)
    return Solution(choices, score, bound, relative, costs, "optimal" if relative <= gap else "feasible", seconds)
