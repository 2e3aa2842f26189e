"""The search beside PuLP with CBC and python-mip, on the same generated tables: seconds, objective, limits.

Each gets the table in memory, one thread, the same relative gap and time limit; its seconds last from there to
the choice, model building included. Running out of time counts as the whole limit. Limits are checked in
fractions, for all three. Needs `pip install -e ".[bench]"`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import report
from puzzle_nas.errors import SearchTimeoutError
from puzzle_nas.search import Limit, Problem, Table, solve

GAP, SECONDS = 1e-4, 60.0
Choice = list[int]


def problem(columns: dict[str, np.ndarray], shares: dict[str, float]) -> Problem:
    """Minimise `score`; each limit lies the given share of the way from the least to the largest total."""
    layers, variants = columns["score"].shape
    names = tuple(tuple(f"v{j}" for j in range(variants)) for _ in range(layers))
    limits = []
    for column, share in shares.items():
        least, most = columns[column].min(axis=1).sum(), columns[column].max(axis=1).sum()
        limits.append(Limit(column, maximum=float(least + share * (most - least))))
    table = Table(tuple(range(layers)), names, {name: tuple(values) for name, values in columns.items()})
    return Problem(table, "score", limits=tuple(limits))


def like_a_model(layers: int, variants: int, seed: int) -> Problem:
    """Smaller variants are cheaper and harm more, unevenly over the layers, as measured scores and costs do."""
    rng = np.random.default_rng(seed)
    size = rng.random((layers, variants))
    importance = rng.lognormal(0.0, 0.8, (layers, 1))
    score = importance * (1 - size) ** 2 * rng.lognormal(0.0, 0.3, size.shape) / layers
    memory = 1e6 * (size * rng.lognormal(0.0, 0.2, size.shape) + 0.05)
    runtime = size * rng.lognormal(0.0, 0.4, size.shape) + 0.1
    return problem({"score": score, "memory": memory, "runtime": runtime}, {"memory": 0.3, "runtime": 0.25})


def experts(layers: int, variants: int, seed: int) -> Problem:
    """Mixture of experts: how many are kept in whole numbers, at several widths, under three limits."""
    rng = np.random.default_rng(seed)
    kept, width = np.divmod(np.arange(variants), 10)
    kept, width = (kept + 1) / (kept.max() + 1), (width + 1) / 10
    importance = rng.lognormal(0.0, 0.7, (layers, 1))
    noise = rng.lognormal(0.0, 0.1, (layers, variants))
    score = importance * ((1 - kept) ** 2 + 0.7 * (1 - width) ** 2) * noise / layers
    memory = np.tile(np.round(1e6 * kept * width), (layers, 1))
    runtime = (0.3 + 0.7 * width) * rng.lognormal(0.0, 0.05, (layers, variants))
    transfer = (0.5 + kept) * rng.lognormal(0.0, 0.05, (layers, variants))
    columns = {"score": score, "memory": memory, "runtime": runtime, "transfer": transfer}
    return problem(columns, {"memory": 0.4, "runtime": 0.5, "transfer": 0.6})


def correlated(layers: int, variants: int, seed: int, limits: int) -> Problem:
    """Weakly correlated knapsacks: the score is all but the negated sum of the costs, so bounds are weak."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(100, 1000, (limits, layers, variants)).astype(float)
    score = 2000.0 * limits - costs.sum(axis=0) + rng.integers(0, 100, (layers, variants))
    columns = {"score": score, **{f"cost{i}": cost for i, cost in enumerate(costs)}}
    return problem(columns, {name: 0.5 for name in columns if name != "score"})


TABLES: dict[str, list[Problem]] = {
    "80x54": [like_a_model(80, 54, seed) for seed in range(3)],
    "200x400": [like_a_model(200, 400, seed) for seed in range(2)],
    "64x1000": [experts(64, 1000, seed) for seed in range(2)],
    "correlated_50x20_2_limits": [correlated(50, 20, 0, 2)],
    "correlated_30x20_5_limits": [correlated(30, 20, 0, 5)],
}


def ours(asked: Problem) -> Choice | None:
    """`puzzle_nas.search.solve`."""
    try:
        (solution,) = solve(asked, GAP, SECONDS)
    except SearchTimeoutError:
        return None
    return [asked.table.variants[i].index(solution.choices[i]) for i in range(len(asked.table.positions))]


def cbc(asked: Problem) -> Choice | None:
    """PuLP and the CBC that it carries."""
    import pulp

    model = pulp.LpProblem("search", pulp.LpMinimize)
    x = [
        [pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(len(v))] for i, v in enumerate(asked.table.variants)
    ]
    flat = [variable for row in x for variable in row]

    def total(column: str) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression(zip(flat, np.concatenate(asked.table.columns[column]).tolist(), strict=True))

    model += total(asked.objective)
    for row in x:
        model += pulp.LpAffineExpression([(variable, 1) for variable in row]) == 1
    for limit in asked.limits:
        model += total(limit.column) <= limit.maximum
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=SECONDS, threads=1))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    return [int(np.argmax([variable.value() for variable in row])) for row in x]


def python_mip(asked: Problem) -> Choice | None:
    """python-mip, which the paper used, and its CBC."""
    import mip

    model = mip.Model(solver_name=mip.CBC)
    model.verbose, model.threads, model.max_mip_gap = 0, 1, GAP
    x = [[model.add_var(var_type=mip.BINARY) for _ in variants] for variants in asked.table.variants]
    flat = [variable for row in x for variable in row]

    def total(column: str) -> mip.LinExpr:
        return mip.LinExpr(flat, np.concatenate(asked.table.columns[column]).tolist())

    model.objective = mip.minimize(total(asked.objective))
    for row in x:
        model += mip.LinExpr(row, [1.0] * len(row)) == 1
    for limit in asked.limits:
        model += total(limit.column) <= limit.maximum
    model.optimize(max_seconds=SECONDS)
    if not model.num_solutions:
        return None
    return [int(np.argmax([variable.x for variable in row])) for row in x]


SOLVERS: dict[str, Callable[[Problem], Choice | None]] = {"ours": ours, "cbc": cbc, "python_mip": python_mip}


def violations(asked: Problem, choice: Choice) -> int:
    """How many limits a choice breaks, in exact arithmetic."""
    totals = {
        limit.column: sum(
            Fraction(float(values[j])) for values, j in zip(asked.table.columns[limit.column], choice, strict=True)
        )
        for limit in asked.limits
    }
    return sum(totals[limit.column] > Fraction(limit.maximum or 0.0) for limit in asked.limits)


def timed(solver: Callable[[Problem], Choice | None], asked: Problem) -> tuple[float, Choice | None]:
    """Seconds, at most the time limit, and the choice, None when there was none in time."""
    started = time.perf_counter()
    choice = solver(asked)
    return (SECONDS if choice is None else min(SECONDS, time.perf_counter() - started)), choice


def main(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help=", ".join(TABLES))] = None,
) -> None:
    """Print the table and keep the figures."""
    figures: dict[str, float] = {"gap": GAP, "time_limit_seconds": SECONDS}
    faults = {what: dict.fromkeys(SOLVERS, 0) for what in ("limit_violations", "timeouts", "without_solution")}
    print(f"{'':28s}" + "".join(f"{name + ' s':>14s}{'objective':>14s}" for name in SOLVERS))
    for label in tables or TABLES:
        seconds: dict[str, list[float]] = {name: [] for name in SOLVERS}
        objectives: dict[str, list[float]] = {name: [] for name in SOLVERS}
        for asked in TABLES[label]:
            line = f"{label:28s}"
            for name, solver in SOLVERS.items():
                spent, choice = timed(solver, asked)
                seconds[name].append(spent)
                picked = zip(asked.table.columns["score"], choice or (), strict=choice is not None)
                objectives[name].append(math.fsum(float(row[j]) for row, j in picked) if choice else math.nan)
                faults["timeouts"][name] += spent == SECONDS
                faults["without_solution"][name] += choice is None
                faults["limit_violations"][name] += violations(asked, choice) if choice else 0
                line += f"{spent:14.2f}{objectives[name][-1]:14.6g}"
            print(line, flush=True)
        for name in SOLVERS:
            figures[f"seconds_{name}_{label}"] = round(statistics.mean(seconds[name]), 3)
            if name != "ours":
                ratio = statistics.mean(seconds["ours"]) / statistics.mean(seconds[name])
                figures[f"seconds_ours_over_{name}_{label}"] = round(ratio, 4)
                pairs = zip(objectives["ours"], objectives[name], strict=True)
                if ratios := [a / b for a, b in pairs if not math.isnan(a + b)]:
                    figures[f"objective_ours_over_{name}_{label}"] = round(statistics.mean(ratios), 7)
    figures |= {
        what + ("" if name == "ours" else f"_{name}"): count
        for what, by_solver in faults.items()
        for name, count in by_solver.items()
    }
    report("search", figures)
