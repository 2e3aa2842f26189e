"""Why limits cannot be met, and by how much each must give."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Literal, TypeAlias

import numpy as np

from puzzle_nas.errors import InfeasibleError
from puzzle_nas.search.problem import Limit, Problem
from puzzle_nas.search.program import Row, build_program
from puzzle_nas.search.solver import least_violation, optimise

End: TypeAlias = Literal["maximum", "minimum"]
DIAGNOSIS_SECONDS = 5.0
"""Longest time spent on each number of the explanation."""


@dataclass(frozen=True)
class LimitReport:
    """What one end of one limit can reach."""

    column: str
    end: End
    asked: float
    reachable_alone: float
    """The tightest value with no other limit."""
    reachable_with_others: float | None
    """The tightest value while the others hold; None when those conflict (or time was up)."""
    joint: float
    """A value to which this end can be set so that, with those of the other limits, a choice exists."""


class InfeasibleLimitsError(InfeasibleError):
    """No choice meets the limits; `reports` holds what each can reach."""

    def __init__(self, message: str, reports: list[LimitReport]):
        super().__init__(message)
        self.reports = reports


def explain_infeasible(problem: Problem, time_limit_seconds: float) -> InfeasibleLimitsError:
    """The error for limits that no choice meets."""
    program = build_program(problem)
    both: tuple[End, ...] = ("maximum", "minimum")
    ends: list[tuple[Limit, End]] = [
        (limit, end) for limit in problem.limits for end in both if getattr(limit, end) is not None
    ]
    rows = [end for row in program.rows for end in row.ends()]
    seconds = min(time_limit_seconds, DIAGNOSIS_SECONDS)
    compromise = least_violation(program, time.monotonic() + seconds)
    reports = []
    for index, ((limit, end), row) in enumerate(zip(ends, rows, strict=True)):
        others = replace(program, cost=row.values, rows=tuple(rows[:index] + rows[index + 1 :]))
        answer = optimise(others, 0.0, row.fixed, time.monotonic() + seconds)
        alone = _reached(row, program.chain.shortest_path(row.values))
        with_others = None if answer.path is None else _reached(row, answer.path)
        joint = max(row.upper, _reached(row, compromise))
        sign = 1.0 if end == "maximum" else -1.0
        reports.append(
            LimitReport(
                limit.column,
                end,
                sign * row.upper,
                sign * alone,
                None if with_others is None else sign * with_others,
                sign * joint,
            )
        )
    return InfeasibleLimitsError(_sentence(reports), reports)


def _reached(row: Row, path: np.ndarray) -> float:
    """The smallest float that is not below the row's exact total: a bound set to it is met."""
    terms = [*row.values[path].tolist(), row.fixed]
    total = math.fsum(terms)
    return total if math.fsum([*terms, -total]) <= 0 else math.nextafter(total, math.inf)


def _shown(value: float, end: str) -> str:
    """Six digits, rounded to the side on which the limit can be met; whole numbers in full."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    rounding = ROUND_CEILING if end == "maximum" else ROUND_FLOOR
    return f"{float(Context(prec=6, rounding=rounding).create_decimal_from_float(value)):.6g}"


def _sentence(reports: list[LimitReport]) -> str:
    parts = []
    for report in reports:
        sign, word = ("<=", "above") if report.end == "maximum" else (">=", "below")
        text = f"{report.column} {sign} {report.asked:.15g} can come to "
        text += _shown(report.reachable_alone, report.end)
        if len(reports) > 1:
            text += " alone"
            if report.reachable_with_others is None:
                text += " and to nothing while the others hold"
            else:
                text += f" and to {_shown(report.reachable_with_others, report.end)} while the others hold"
        need = report.reachable_with_others if len(reports) > 1 else report.reachable_alone
        if need is not None and need != report.asked:
            text += f" ({_shown(abs(need - report.asked), 'maximum')} {word} the limit)"
        parts.append(text)
    joint = [
        f"{r.column} {'<=' if r.end == 'maximum' else '>='} {_shown(r.joint, r.end)}"
        for r in reports
        if r.joint != r.asked
    ]
    way_out = f"set {' and '.join(joint)} to make it possible" if joint else "loosen one of them a little"
    return f"No choice meets the limits: {'; '.join(parts)}; {way_out}."
