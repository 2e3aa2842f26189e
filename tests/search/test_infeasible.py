"""The explanation of limits that cannot be met, against brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_tables import every_choice, meets, table_of

from puzzle_nas.search import InfeasibleLimitsError, Limit, Problem, solve


@st.composite
def strict_problems(draw) -> Problem:
    """Limits that often conflict."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    numbers = st.integers(-30, 90).map(lambda n: n / 10)
    columns = {
        name: [[draw(numbers) for _ in range(size)] for size in sizes] for name in ("score", "memory", "runtime")
    }
    longest = [len(sizes) - position for position in range(len(sizes))]
    spans = [
        [1, *(draw(st.integers(1, most)) for _ in range(size - 1))] for most, size in zip(longest, sizes, strict=True)
    ]
    bound = st.integers(-100, 200).map(lambda n: n / 10)
    low, high = draw(bound), draw(bound)
    limits = (Limit("memory", maximum=low), Limit("runtime", draw(st.sampled_from([None, low])), high))
    table = table_of(columns, draw(st.sampled_from([None, spans])))
    return Problem(table, "score", limits=limits, fixed={"memory": 1.0})


def tightest(problem: Problem, column: str, end: str, others: bool) -> Fraction | None:
    """The tightest exact total of a column, alone or while the other ends of limits hold."""
    choices = [c for c in every_choice(problem) if not others or meets(problem, c, ((column, end),))]
    totals = [choice.totals[column] for choice in choices]
    return (min if end == "maximum" else max)(totals, default=None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strict_problems())
def test_reports_equal_brute_force(problem):
    choices = every_choice(problem)
    if any(meets(problem, choice) for choice in choices):
        assert solve(problem)
        return
    with pytest.raises(InfeasibleLimitsError) as caught:
        solve(problem)
    reports = caught.value.reports
    for report in reports:
        alone = tightest(problem, report.column, report.end, others=False)
        others = tightest(problem, report.column, report.end, others=True)
        assert report.reachable_alone == pytest.approx(float(alone), rel=1e-15)
        assert (report.reachable_with_others is None) == (others is None)
        if others is not None:
            assert report.reachable_with_others == pytest.approx(float(others), rel=1e-15)
        assert report.column in str(caught.value)
        # The value that is named can really be asked for.
        bounds = {f"{report.end}": report.reachable_alone}
        assert solve(Problem(problem.table, "score", limits=(Limit(report.column, **bounds),), fixed=problem.fixed))
    together = tuple(Limit(report.column, **{report.end: report.joint}) for report in reports)
    assert solve(Problem(problem.table, "score", limits=together, fixed=problem.fixed))


def test_one_limit_in_a_sentence():
    table = table_of({"score": [[0.0, 1.0]], "memory_bytes": [[5e9, 4123456789.0]]})
    with pytest.raises(InfeasibleLimitsError) as caught:
        solve(Problem(table, "score", limits=(Limit("memory_bytes", maximum=4e9),)))
    assert str(caught.value) == (
        "No choice meets the limits: memory_bytes <= 4000000000 can come to 4123456789 (123456789 above "
        "the limit); set memory_bytes <= 4123456789 to make it possible."
    )


def test_conflicting_limits_in_a_sentence():
    table = table_of({"score": [[0.0, 1.0]], "memory": [[10.0, 4.0]], "runtime": [[1.0, 3.5]]})
    limits = (Limit("memory", maximum=5.0), Limit("runtime", maximum=2.0))
    with pytest.raises(InfeasibleLimitsError) as caught:
        solve(Problem(table, "score", limits=limits))
    assert str(caught.value) == (
        "No choice meets the limits: memory <= 5 can come to 4 alone and to 10 while the others hold (5 "
        "above the limit); runtime <= 2 can come to 1 alone and to 3.5 while the others hold (1.5 "
        "above the limit); set runtime <= 3.5 to make it possible."
    )
