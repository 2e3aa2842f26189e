"""Small random tables, and every choice of a problem by brute force in exact arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from puzzle_nas.search import Problem, Table


@dataclass
class Choice:
    """One way to cover all positions."""

    choices: dict
    covered: tuple
    totals: dict[str, Fraction]


def table_of(columns: dict[str, list[list[float]]], spans: list[list[int]] | None = None) -> Table:
    """A table from nested lists, positions 0, 1, ... and variants a, b, ..."""
    sizes = [len(values) for values in next(iter(columns.values()))]
    return Table(
        tuple(range(len(sizes))),
        tuple(tuple("abcdefghij"[:size]) for size in sizes),
        {name: tuple(np.array(values, float) for values in column) for name, column in columns.items()},
        tuple(np.array(values) for values in spans) if spans else (),
    )


def every_choice(problem: Problem) -> list[Choice]:
    """All covers with their exact totals."""
    table = problem.table

    def covers(position: int):
        if position == len(table.positions):
            yield ()
            return
        for variant, span in enumerate(table.spans[position].tolist()):
            for rest in covers(position + span):
                yield ((position, variant, span), *rest)

    result = []
    for cover in covers(0):
        covered = itertools.chain.from_iterable([(p, v)] * span for p, v, span in cover)
        totals = {
            name: Fraction(problem.fixed.get(name, 0.0))
            + sum((Fraction(float(column[p][v])) for p, v, _ in cover), Fraction(0))
            for name, column in table.columns.items()
        }
        names = {table.positions[p]: table.variants[p][v] for p, v, _ in cover}
        result.append(Choice(names, tuple(covered), totals))
    return result


def meets(problem: Problem, choice: Choice, leave_out: tuple = ()) -> bool:
    """Whether a choice is within every limit (but those left out), exactly."""
    for limit in problem.limits:
        total = choice.totals[limit.column]
        if (limit.column, "maximum") not in leave_out and limit.maximum is not None and total > limit.maximum:
            return False
        if (limit.column, "minimum") not in leave_out and limit.minimum is not None and total < limit.minimum:
            return False
    return True


def best_score(problem: Problem, choices: list[Choice]) -> Fraction | None:
    """The best exact total of the objective among the choices within the limits."""
    scores = [choice.totals[problem.objective] for choice in choices if meets(problem, choice)]
    if not scores:
        return None
    return min(scores) if problem.sense == "minimise" else max(scores)
