"""The search against brute force, in exact arithmetic."""

from __future__ import annotations

import os
import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_tables import best_score, every_choice, meets, table_of

from puzzle_nas.errors import InfeasibleError, RecipeError, SearchTimeoutError
from puzzle_nas.search import FewerSolutionsError, Limit, Problem, Table, solve

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw, spans: bool = False, scale: float = 1.0) -> Problem:
    """Up to 5 positions of up to 4 variants, and bounds at, just below or far from a reachable total."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    kind = draw(st.sampled_from(["whole", "tenths", "any"]))
    number = {
        "whole": st.integers(-5, 9).map(float),
        "tenths": st.integers(-5, 9).map(lambda n: n / 10),
        "any": st.floats(-1, 1, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0),
    }[kind]
    columns = {
        name: [[factor * draw(number) for _ in range(size)] for size in sizes]
        for name, factor in (("score", scale), ("memory", 1.0), ("runtime", 1000.0))
    }
    lengths = None
    if spans:
        longest = [min(3, len(sizes) - position) for position in range(len(sizes))]
        lengths = [
            [1, *(draw(st.integers(1, most)) for _ in range(size - 1))]
            for most, size in zip(longest, sizes, strict=True)
        ]
    table = table_of(columns, lengths)
    fixed = {"memory": draw(st.sampled_from([0.0, 3.0])), "score": scale * draw(st.sampled_from([0.0, 1.0]))}
    sense = draw(st.sampled_from(["minimise", "maximise"]))
    free = Problem(table, "score", sense, (), fixed)
    choices = every_choice(free)
    limits = []
    limited = [(), ("memory",), ("memory", "runtime"), ("memory", "score"), ("memory", "runtime", "score", "memory")]
    for column in draw(st.sampled_from(limited)):
        anchor = float(draw(st.sampled_from(choices)).totals[column])
        anchor = draw(st.sampled_from([anchor, float(np.nextafter(anchor, -np.inf)), anchor + 0.5]))
        ends = [(None, anchor), (anchor, None), (anchor, anchor), (anchor - 1, anchor)]
        low, high = draw(st.sampled_from(ends))
        limits.append(Limit(column, low, high))
    return Problem(table, "score", sense, tuple(limits), fixed)


def check_against_brute_force(problem: Problem) -> None:
    """The optimum, its totals and its bound, or that there is none."""
    choices = every_choice(problem)
    expected = best_score(problem, choices)
    if expected is None:
        with pytest.raises(InfeasibleError):
            solve(problem, gap=0.0)
        return
    (solution,) = solve(problem, gap=0.0)
    chosen = next(choice for choice in choices if choice.choices == solution.choices)
    assert meets(problem, chosen)
    assert solution.costs == {name: float(total) for name, total in chosen.totals.items()}
    reach = max(np.abs(values).max() for values in problem.table.columns["score"])
    assert abs(chosen.totals["score"] - expected) <= 1e-12 * Fraction(float(reach))
    assert solution.score == float(chosen.totals["score"])
    assert solution.status == "optimal" and solution.gap == 0


@EXAMPLES
@given(problems())
def test_equals_brute_force(problem):
    check_against_brute_force(problem)


@EXAMPLES
@given(problems(scale=1e-9))
def test_equals_brute_force_with_tiny_scores(problem):
    check_against_brute_force(problem)


@EXAMPLES
@given(problems(spans=True))
def test_spans_equal_brute_force(problem):
    check_against_brute_force(problem)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.one_of(problems(), problems(spans=True)), st.integers(1, 3))
def test_diverse_solutions_equal_brute_force_one_after_the_other(problem, min_different):
    choices = [choice for choice in every_choice(problem) if meets(problem, choice)]
    if not choices:
        return
    try:
        solutions = solve(problem, gap=0.0, num_solutions=4, min_different=min_different)
        complete = True
    except FewerSolutionsError as error:
        solutions, complete = error.solutions, False
    left = choices
    for solution in solutions:
        best = best_score(problem, left)
        assert best is not None and solution.score == pytest.approx(float(best), abs=1e-12, rel=1e-12)
        taken = next(choice for choice in left if choice.choices == solution.choices)
        left = [
            choice
            for choice in left
            if sum(a != b for a, b in zip(choice.covered, taken.covered, strict=True)) >= min_different
        ]
    assert complete or not left


def random_problem(seed: int, positions: int = 30, variants: int = 20, share: float = 0.5) -> Problem:
    """A table of the size of a real model, with two limits that bind."""
    rng = np.random.default_rng(seed)
    columns = {name: tuple(rng.random((positions, variants))) for name in ("score", "memory", "runtime")}
    labels = tuple(range(positions))
    table = Table(labels, tuple(tuple(f"v{j}" for j in range(variants)) for _ in labels), columns)
    limits = tuple(
        Limit(name, maximum=share * sum(float(values.mean()) for values in columns[name]))
        for name in ("memory", "runtime")
    )
    return Problem(table, "score", limits=limits)


@pytest.mark.parametrize("seed", range(4))
def test_larger_tables_reach_the_gap_within_exact_limits(seed):
    problem = random_problem(seed)
    (solution,) = solve(problem, gap=1e-4)
    assert solution.status == "optimal" and solution.gap is not None and solution.gap <= 1e-4
    for limit in problem.limits:
        column, names = problem.table.columns[limit.column], problem.table.variants
        exact = sum(Fraction(float(column[i][names[i].index(solution.choices[i])])) for i in range(30))
        assert limit.maximum is not None and exact <= Fraction(limit.maximum)
    (proven,) = solve(problem, gap=0.0)
    assert proven.score <= solution.score <= proven.score * (1 + 1.001e-4)
    assert solution.bound is not None and solution.bound <= proven.score


def test_solutions_differ_in_so_many_positions_as_asked():
    solutions = solve(random_problem(0), num_solutions=4, min_different=6)
    for index, later in enumerate(solutions):
        for earlier in solutions[:index]:
            assert sum(later.choices[p] != earlier.choices[p] for p in later.choices) >= 6
    assert [s.score for s in solutions] == sorted(s.score for s in solutions)


def test_dominated_variants_serve_later_solutions():
    table = table_of({"score": [[1.0, 1.5, 9.0]], "memory": [[1.0, 2.0, 1.0]]})
    problem = Problem(table, "score", limits=(Limit("memory", maximum=2.0),))
    assert [s.choices[0] for s in solve(problem, num_solutions=3)] == ["a", "b", "c"]
    with pytest.raises(FewerSolutionsError, match="Only 3 of 4") as caught:
        solve(problem, num_solutions=4)
    assert len(caught.value.solutions) == 3


def test_many_choices_that_break_a_limit_by_a_rounding_error_are_refused():
    # Sums of these floats that would be 1.5 in decimals lie a rounding error above or below it.
    rng = np.random.default_rng(0)
    columns = {
        "score": [list(rng.random(3)) for _ in range(10)],
        "cost": [[0.1, 0.2, 0.30000000000000004] for _ in range(10)],
    }
    problem = Problem(table_of(columns), "score", limits=(Limit("cost", maximum=1.5),))
    (solution,) = solve(problem)
    exact = sum(Fraction([0.1, 0.2, 0.30000000000000004]["abc".index(v)]) for v in solution.choices.values())
    assert exact <= Fraction(1.5)
    assert solution.bound is not None and solution.bound <= solution.score


def test_a_fixed_part_beyond_the_limit_leaves_room_for_negative_costs_only():
    table = table_of({"score": [[0.0, 1.0]] * 2, "memory": [[0.0, -3.0]] * 2})
    problem = Problem(table, "score", limits=(Limit("memory", maximum=5.0),), fixed={"memory": 10.0})
    assert solve(problem)[0].choices == {0: "b", 1: "b"}
    with pytest.raises(InfeasibleError):
        solve(Problem(table, "score", limits=(Limit("memory", maximum=3.0),), fixed={"memory": 10.0}))


def test_no_limits_takes_the_best_of_every_position():
    (solution,) = solve(Problem(table_of({"score": [[2.0, 1.0], [0.0, 3.0]]}), "score"))
    assert solution.choices == {0: "b", 1: "a"}


@pytest.mark.parametrize(("positions", "variants"), [(200, 400), (64, 1000)])
def test_big_tables_reach_the_gap(positions, variants):
    problem = random_problem(0, positions, variants)
    (solution,) = solve(problem, gap=1e-4)
    assert solution.status == "optimal" and solution.gap is not None and solution.gap <= 1e-4
    for limit in problem.limits:
        column, names = problem.table.columns[limit.column], problem.table.variants
        exact = sum(Fraction(float(column[i][names[i].index(v)])) for i, v in solution.choices.items())
        assert limit.maximum is not None and exact <= Fraction(limit.maximum)


@pytest.mark.parametrize("factor", [2.0**-50, 2.0**50])
def test_the_unit_of_the_score_does_not_matter(factor):
    problem = random_problem(2, 20, 10)
    columns = dict(problem.table.columns)
    columns["score"] = tuple(factor * values for values in columns["score"])
    scaled = Problem(Table(problem.table.positions, problem.table.variants, columns), "score", limits=problem.limits)
    (one,), (other,) = solve(problem, gap=0.0), solve(scaled, gap=0.0)
    assert other.status == "optimal" and other.gap == 0
    assert other.score / factor == pytest.approx(one.score, rel=1e-15)


def correlated_problem() -> Problem:
    """Five limits on costs whose sum is nearly the negated score: far beyond a second."""
    rng = np.random.default_rng(0)
    costs = rng.integers(100, 1000, (5, 30, 20)).astype(float)
    score = 1e4 - costs.sum(axis=0) + rng.integers(0, 100, (30, 20))
    columns = {"score": tuple(score), **{f"cost{i}": tuple(cost) for i, cost in enumerate(costs)}}
    table = Table(tuple(range(30)), (tuple(f"v{j}" for j in range(20)),) * 30, columns)
    limits = tuple(Limit(f"cost{i}", maximum=float(cost.mean(axis=1).sum())) for i, cost in enumerate(costs))
    return Problem(table, "score", limits=limits)


def test_out_of_time_gives_the_best_found_with_its_gap():
    problem = correlated_problem()
    (solution,) = solve(problem, gap=1e-6, time_limit_seconds=1.0)
    assert solution.status == "feasible" and solution.bound is not None and solution.bound < solution.score
    assert solution.gap == (solution.score - solution.bound) / solution.score > 1e-6
    assert all(solution.costs[limit.column] <= (limit.maximum or 0) for limit in problem.limits)


def test_ctrl_c_ends_the_search_at_once():
    started = time.monotonic()
    # Where the tests run in the background, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            solve(correlated_problem(), gap=0.0, time_limit_seconds=60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60


def test_time_runs_out():
    problem = random_problem(1, 60, 40, 0.6)
    try:
        (solution,) = solve(problem, gap=0.0, time_limit_seconds=1e-9)
    except SearchTimeoutError as error:
        assert "raise the time limit" in str(error)
    else:
        assert solution.status == "feasible"


@pytest.mark.parametrize("name", ["gap", "time_limit_seconds", "num_solutions", "min_different"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_arguments_out_of_range(name, value):
    with pytest.raises(RecipeError, match="A search needs"):
        solve(random_problem(0, 2, 2), **{name: value})
