"""The cheapest path of a program within its rows: bounds of our own, then HiGHS on what they leave.

From cheap to dear: drop dominated arcs; solve the linear relaxation; its prices give a bound that we compute
ourselves; round and repair it to a first path; drop the arcs that cannot beat that; sweep the layers, ever wider;
branch and bound on what that leaves open. Whatever comes back is checked against every row in exact arithmetic.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace

import highspy
import numpy as np

from puzzle_nas.search.heuristic import find_path, improve
from puzzle_nas.search.program import Program, Row
from puzzle_nas.search.sweep import MOST_EXTENSIONS, sweep

Status = highspy.HighsModelStatus
TOLERANCE = 1e-9
"""Feasibility tolerance of the solver, for rows whose largest coefficient is 1."""
SCORE_SCALE = 1e4
"""Cost of the dearest variant as the solver sees it, far above its absolute tolerances."""
WIDTHS = (300, 1500, 6000, 24000, 96000)
"""Of the sweeps over the layers; the last two take longer and follow only where they promise to close the gap."""
CHEAP_WIDTHS = 4
NUM_PRICES = 12
"""Price vectors that bound what a sweep has chosen so far."""
EXCLUSIONS = 25
"""Choices that break a limit by less than the tolerance are excluded one by one, at most so many."""


@dataclass(frozen=True)
class Answer:
    """What is known about a program: the best path (None: none found) and a bound (infinite: none exists)."""

    path: np.ndarray | None
    bound: float


def differing(program: Program, path: np.ndarray, positions: int) -> Row:
    """The row that asks for a path that differs from `path` in so many positions."""
    values = np.zeros(len(program.cost))
    values[path] = program.chain.span[path]
    return Row(values, upper=float(program.chain.length - positions))


def optimise(program: Program, gap: float, offset: float, deadline: float) -> Answer:
    """The cheapest path that meets every row exactly, to a relative `gap` of cost plus `offset`.

    A path that breaks a row by less than the solver can see is excluded and the solve repeated; should there
    be many, the rows are tightened by a hair, while the bound stays that of the rows as given.
    """
    ends = [end for row in program.rows for end in row.ends()]
    if any(end.excess(program.chain.shortest_path(end.values)) > 0 for end in ends):
        return Answer(None, math.inf)
    best: np.ndarray | None = None
    bound, excluded = -math.inf, []
    while len(excluded) < EXCLUSIONS:
        trial = replace(program, rows=(*program.rows, *excluded))
        path, trial_bound, best = _search(trial, best, gap, offset, deadline)
        bound = max(bound, trial_bound)
        if path is None or program.feasible(path) or _close(program, best, bound, gap, offset):
            return Answer(best, bound)
        if time.monotonic() >= deadline:
            return Answer(best, bound)
        excluded.append(differing(program, path, 1))
    tight = replace(program, rows=tuple(_tightened(program, row) for row in program.rows))
    path, trial_bound, best = _search(tight, best, gap, offset, deadline)
    return Answer(best, math.inf if best is None and trial_bound == math.inf else bound)


def _tightened(program: Program, row: Row) -> Row:
    reach = np.abs(program.chain.above(program.chain.potentials(row.values), row.values)).max()
    hair = 10 * TOLERANCE * float(reach)
    return replace(row, lower=row.lower + hair, upper=row.upper - hair)


def _close(program: Program, path: np.ndarray | None, bound: float, gap: float, offset: float) -> bool:
    if path is None:
        return False
    score = program.score(path)
    return score - bound <= gap * abs(score + offset)


def _better(program: Program, *paths: np.ndarray | None) -> np.ndarray | None:
    """The cheapest of the paths that meet every row."""
    allowed = [path for path in paths if path is not None and program.feasible(path)]
    return min(allowed, key=program.score, default=None)


def _search(
    program: Program, best: np.ndarray | None, gap: float, offset: float, deadline: float
) -> tuple[np.ndarray | None, float, np.ndarray | None]:
    """The solver's path (rows hold to its tolerance only), a bound, and the best path that truly fits."""
    program = program.binding()
    if not program.rows:
        best = program.chain.shortest_path(program.cost)
        return best, program.score(best), best
    kept = np.flatnonzero(program.possible())
    if not program.chain.subset(kept).connected or any(row.lower > row.upper for row in program.rows):
        return None, math.inf, best
    kept = kept[program.subset(kept).undominated()]
    core = program.subset(kept)
    relaxed = _relax(core, deadline)
    if relaxed is None:
        return None, math.inf, best
    likely, prices = relaxed
    lengths = core.cost + prices @ core.scaled_rows[0]
    bound = _priced_bound(core, prices)[0]
    found = find_path(core, likely, lengths)
    best = _better(program, best, None if found is None else kept[found])
    if _close(program, best, bound, gap, offset):
        return best, bound, best
    kept, core, bound, best = _sweeps(program, kept, core, bound, best, prices, gap, offset, deadline)
    if bound == math.inf or _close(program, best, bound, gap, offset):
        return best, bound, best
    start = None
    if best is not None and np.isin(best, kept).all():
        start = np.searchsorted(kept, best)
    path, inner_bound = _branch_and_bound(core, start, gap, offset, deadline)
    if best is not None:
        inner_bound = min(inner_bound, program.score(best))
    if path is None:
        return best, max(bound, inner_bound), best
    path = kept[path]
    return path, max(bound, inner_bound), _better(program, best, path)


def _priced_bound(program: Program, prices: np.ndarray) -> tuple[float, np.ndarray]:
    """A bound on the cost of every path, and by how much it rises for the paths through each arc."""
    matrix, lower, upper = program.scaled_rows
    value, through = program.chain.shortest(program.cost + prices @ matrix)
    priced = prices != 0
    return value - float(prices[priced] @ np.where(prices > 0, upper, lower)[priced]), through


def _useful(program: Program, prices: np.ndarray, score: float) -> np.ndarray:
    """Mask of the arcs through which a path may cost as little as `score`."""
    bound, through = _priced_bound(program, prices)
    return bound + through <= score + 1e-12 * (abs(score) + float(np.abs(program.cost).sum()))


def _sweeps(
    program: Program,
    kept: np.ndarray,
    core: Program,
    bound: float,
    best: np.ndarray | None,
    prices: np.ndarray,
    gap: float,
    offset: float,
    deadline: float,
) -> tuple[np.ndarray, Program, float, np.ndarray | None]:
    """Sweeps over the layers, as long as a wider one may close the gap; what they leave of the core, bound and best."""
    for number, width in enumerate(WIDTHS, start=1):
        if best is not None:
            useful = _useful(core, prices, program.score(best))
            kept, core = kept[useful], core.subset(useful)
        if core.chain.has_spans or not core.chain.connected:
            break
        if width * int(np.bincount(core.chain.start).max()) > MOST_EXTENSIONS:
            break
        around = _prices_around(core, deadline)
        if around is None:
            break
        prices, target = around[0], _target(program, best, gap, offset)
        path, least = sweep(core, around, width, target, deadline)
        best = _better(program, best, None if path is None else kept[improve(core, path)])
        reached = min(target, least) if best is None else min(target, least, program.score(best))
        growth, bound = reached - bound, max(bound, reached)
        hopeless = number >= CHEAP_WIDTHS and bound + 2 * growth < _target(program, best, gap, offset)
        if hopeless or _close(program, best, bound, gap, offset):
            break
    return kept, core, bound, best


def _target(program: Program, best: np.ndarray | None, gap: float, offset: float) -> float:
    """The bound that closes the gap."""
    if best is None:
        return math.inf
    score = program.score(best)
    return score - 0.999 * gap * abs(score + offset)


def _model(program: Program, offset: float) -> tuple[highspy.HighsLp, float]:
    """Covers and limits as a sparse matrix, and the factor that makes the dearest arc cost `SCORE_SCALE`."""
    chain = program.chain
    potentials = chain.potentials(program.cost)
    cost = chain.above(potentials, program.cost)
    scale = SCORE_SCALE / (float(np.abs(cost).max()) or 1.0)
    matrix, lower, upper = program.scaled_rows
    num_arcs, num_rows = len(cost), len(program.rows)
    # Column by column: the positions that the arc covers, then every row of limits.
    starts = np.concatenate([[0], np.cumsum(chain.span + num_rows)])
    index = np.empty(starts[-1], np.int32)
    values = np.ones(starts[-1])
    covers = np.arange(int(chain.span.sum())) - np.repeat(np.cumsum(chain.span) - chain.span, chain.span)
    index[np.repeat(starts[:-1], chain.span) + covers] = np.repeat(chain.start, chain.span) + covers
    for row in range(num_rows):
        place = starts[:-1] + chain.span + row
        index[place], values[place] = chain.length + row, matrix[row]
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = num_arcs, chain.length + num_rows
    model.col_cost_ = cost * scale
    model.col_lower_, model.col_upper_ = np.zeros(num_arcs), np.ones(num_arcs)
    model.row_lower_ = np.concatenate([np.ones(chain.length), lower])
    model.row_upper_ = np.concatenate([np.ones(chain.length), upper])
    model.offset_ = (float(potentials.sum()) + offset) * scale
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = starts, index, values
    return model, scale


class _Quiet(highspy.Highs):
    """HiGHS 1.16 greets on standard output while it is constructed, before any option can be set; --json is there."""

    def enableCallbacks(self):
        self.silent()
        return super().enableCallbacks()


def _run(model: highspy.HighsLp, deadline: float, gap: float, start: np.ndarray | None = None) -> highspy.Highs:
    """Solve a model; once more without presolve should HiGHS end without an answer."""
    highs = _Quiet()
    for presolve in ("choose", "off"):
        for name, value in {
            "output_flag": False,
            "parallel": "off",
            "presolve": presolve,
            "random_seed": 0,
            "time_limit": max(0.01, deadline - time.monotonic()),
            "primal_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
            "mip_feasibility_tolerance": TOLERANCE,
            "mip_abs_gap": 0.0,
            "mip_rel_gap": 0.999 * gap,
        }.items():
            highs.setOptionValue(name, value)
        highs.passModel(model)
        if start is not None:
            known = highspy.HighsSolution()
            known.col_value = start
            highs.setSolution(known)
        _interruptible(highs)
        if highs.getModelStatus() in (Status.kOptimal, Status.kInfeasible, Status.kTimeLimit):
            break
    return highs


def _interruptible(highs: highspy.Highs) -> None:
    """Solve beside the caller's thread, so that Ctrl-C ends it at once."""
    done = threading.Event()

    def solve() -> None:
        try:
            highs.run()
        finally:
            done.set()

    highs.HandleUserInterrupt = True
    threading.Thread(target=solve, daemon=True).start()
    try:
        done.wait()
    except KeyboardInterrupt:
        highs.cancelSolve()
        done.wait()
        raise


def _relax(program: Program, deadline: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The linear relaxation: how much of each arc and the price of each scaled row; None if infeasible."""
    model, scale = _model(program, 0.0)
    highs = _run(model, deadline, 0.0)
    if highs.getModelStatus() == Status.kInfeasible:
        return None
    prices = _prices(highs, program, scale)
    if prices is None:
        return np.zeros(len(program.cost)), np.zeros(len(program.rows))
    return np.array(highs.getSolution().col_value), prices


def _prices_around(program: Program, deadline: float) -> np.ndarray | None:
    """Prices of the relaxation, then of it with rows moved by a few arcs' worth, `(K, rows)`; None if it fails."""
    model, scale = _model(program, 0.0)
    matrix, lower, upper = program.scaled_rows
    highs = _run(model, deadline, 0.0)
    found = [_prices(highs, program, scale)]
    if found[0] is None:
        return None
    random = np.random.default_rng(0)
    for number in range(1, NUM_PRICES):
        moves = random.normal(size=len(matrix)) * matrix.std(axis=1) * (0.3 if number % 2 else 1.5)
        for row, move in enumerate(moves):
            highs.changeRowBounds(program.chain.length + row, lower[row] + move, upper[row] + move)
        highs.run()
        found.append(_prices(highs, program, scale))
    return np.array([prices for prices in found if prices is not None])


def _prices(highs: highspy.Highs, program: Program, scale: float) -> np.ndarray | None:
    """Of each scaled row, from a relaxation that is solved; None if it is not."""
    solution = highs.getSolution()
    if highs.getModelStatus() != Status.kOptimal or not solution.dual_valid:
        return None
    prices = -np.array(solution.row_dual)[program.chain.length :] / scale
    _, lower, upper = program.scaled_rows
    prices[((prices > 0) & np.isinf(upper)) | ((prices < 0) & np.isinf(lower))] = 0.0
    return prices


def _branch_and_bound(
    program: Program, start: np.ndarray | None, gap: float, offset: float, deadline: float
) -> tuple[np.ndarray | None, float]:
    """HiGHS on the whole program: its best path and its bound on the cost."""
    model, scale = _model(program, offset)
    num_arcs = len(program.cost)
    model.integrality_ = [highspy.HighsVarType.kInteger] * num_arcs
    values = None
    if start is not None:
        values = np.zeros(num_arcs)
        values[start] = 1.0
    highs = _run(model, deadline, gap, values)
    status, info = highs.getModelStatus(), highs.getInfo()
    if status == Status.kInfeasible:
        return None, math.inf
    if status not in (Status.kOptimal, Status.kTimeLimit):
        return None, -math.inf
    bound = info.mip_dual_bound / scale - offset
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, bound
    path = np.flatnonzero(np.array(highs.getSolution().col_value) > 0.5)
    score = program.score(path)
    if status == Status.kOptimal and abs(score - bound) <= TOLERANCE * SCORE_SCALE / scale:
        bound = score
    return path, bound


def least_violation(program: Program, deadline: float) -> np.ndarray:
    """A path that breaks the rows least, summed over the scaled rows (elastic rows)."""
    ends = tuple(end for row in program.rows for end in row.ends())
    model, _ = _model(Program(program.chain, np.zeros(len(program.cost)), ends), 0.0)
    num_arcs = len(program.cost)
    model.num_col_ = num_arcs + len(ends)
    model.col_cost_ = np.concatenate([np.zeros(num_arcs), np.ones(len(ends))])
    model.col_lower_ = np.zeros(model.num_col_)
    model.col_upper_ = np.concatenate([np.ones(num_arcs), np.full(len(ends), highspy.kHighsInf)])
    matrix = model.a_matrix_
    matrix.start_ = np.concatenate([matrix.start_, matrix.start_[-1] + 1 + np.arange(len(ends))])
    matrix.index_ = np.concatenate([matrix.index_, program.chain.length + np.arange(len(ends))])
    matrix.value_ = np.concatenate([matrix.value_, -np.ones(len(ends))])
    kinds = [highspy.HighsVarType.kInteger] * num_arcs + [highspy.HighsVarType.kContinuous] * len(ends)
    model.integrality_ = kinds
    highs = _run(model, deadline, 0.0)
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return program.chain.shortest_path(program.cost)
    return np.flatnonzero(np.array(highs.getSolution().col_value)[:num_arcs] > 0.5)
