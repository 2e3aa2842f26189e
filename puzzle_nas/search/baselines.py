"""What the mixed-integer search is compared with (Puzzle, tables 10 to 12 and appendix)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from puzzle_nas.effort import GAP, TIME_LIMIT_SECONDS
from puzzle_nas.errors import InfeasibleError, RecipeError
from puzzle_nas.search.mip import solve
from puzzle_nas.search.problem import Limit, Position, Problem, Solution, Table
from puzzle_nas.search.program import Program, build_program, choices_of, limit_rows


def no_op_only(problem: Problem, keep: Callable[[Position, str], bool]) -> Problem:
    """The problem with only the parent's variants and no-ops (Puzzle, table 10).

    Args:
        keep: whether the variant of a position is the parent's or a no-op.

    Raises:
        RecipeError: a position would have no variant left.
    """
    return replace(problem, table=problem.table.restricted(keep))


def max_params(
    problem: Problem, params_column: str, gap: float = GAP, time_limit_seconds: float = TIME_LIMIT_SECONDS
) -> Solution:
    """The choice with the most parameters within the same limits, blind to scores (Puzzle, table 12).

    The solution's `score` is the total of `params_column`; the total of the problem's objective is in
    `costs`.

    Raises:
        as `solve`.
    """
    return solve(replace(problem, objective=params_column, sense="maximise"), gap, time_limit_seconds)[0]


def random_architecture(
    problem: Problem, rng: np.random.Generator, time_limit_seconds: float = TIME_LIMIT_SECONDS
) -> Solution:
    """A choice within the limits for scores drawn at random, the same for the same state of `rng`.

    Raises:
        as `solve`.
    """
    draws = tuple(rng.random(len(variants)) for variants in problem.table.variants)
    table = replace(problem.table, columns={**problem.table.columns, "random draw": draws})
    drawn = replace(problem, table=table, objective="random draw", sense="minimise")
    solution = solve(drawn, 1e-2, time_limit_seconds)[0]
    costs = problem.costs(solution.choices)
    return replace(solution, score=costs[problem.objective], bound=None, gap=None, costs=costs, status="feasible")


@dataclass(frozen=True)
class _Option:
    """One combination of variants for the positions of a layer, its numbers exact."""

    ids: tuple[str, ...]
    arcs: tuple[int, ...]
    cost: Fraction
    rows: tuple[Fraction, ...]


def greedy(problem: Problem, groups: Mapping[Any, Hashable] | None = None) -> Solution:
    """Layer by layer, each within its share of every budget (Puzzle, table 11).

    Each budget (a limit less the fixed part) is split equally over the layers. Layers are visited in
    ascending order of their mean score, and each takes the best-scored option that fits its share in every
    limited column, ties by variant id; what it leaves, or overdraws, passes to the next. When nothing fits,
    it takes the option that overshoots least, in sum over the limits of excess over the column's range, and
    later layers pay.

    Args:
        groups: the layer of each position, for tables by sub-block: a layer's options are then all
            combinations of its positions' variants. None makes each position a layer.

    Raises:
        InfeasibleError: the choice ends up outside a limit.
        RecipeError: variants with spans, or positions without a layer.
    """
    started = time.perf_counter()
    program = _one_sided(build_program(problem))
    layers = [_options(problem, program, positions) for positions in _layers(problem.table, groups).values()]
    room = [(Fraction(row.upper) - Fraction(row.fixed)) / len(layers) for row in program.rows]
    ranges = [Fraction(float(np.ptp(row.values)) or 1.0) for row in program.rows]
    carried = [Fraction(0)] * len(room)
    chosen: list[int] = []
    for options in sorted(layers, key=lambda options: sum(o.cost for o in options) / len(options)):
        budget = [share + left for share, left in zip(room, carried, strict=True)]
        best = min(options, key=lambda o: (_overshoot(o, budget, ranges), o.cost, o.ids))
        carried = [given - taken for given, taken in zip(budget, best.rows, strict=True)]
        chosen.extend(best.arcs)
    rows = zip(problem.limits, limit_rows(problem), strict=True)
    broken = [limit.column for limit, row in rows if row.excess(np.array(chosen)) > 0]
    if broken:
        raise InfeasibleError(f"The greedy baseline ends outside the limits on {', '.join(broken)}; loosen them.")
    return _solution(problem, program, chosen, started)


def _one_sided(program: Program) -> Program:
    """The program with one row, bounded above, for each end of a limit."""
    return replace(program, rows=tuple(end for row in program.rows for end in row.ends()))


def _overshoot(option: _Option, budget: list[Fraction], ranges: list[Fraction]) -> Fraction:
    over = ((row - given) / scale for row, given, scale in zip(option.rows, budget, ranges, strict=True))
    return sum((part for part in over if part > 0), Fraction(0))


def _options(problem: Problem, program: Program, positions: list[int]) -> list[_Option]:
    single = []
    for position in positions:
        arcs = range(*program.chain.arcs_of(position).indices(len(program.cost)))
        single.append(
            [
                _Option(
                    (variant,),
                    (arc,),
                    Fraction(float(program.cost[arc])),
                    tuple(Fraction(float(row.values[arc])) for row in program.rows),
                )
                for arc, variant in zip(arcs, problem.table.variants[position], strict=True)
            ]
        )
    return [
        _Option(
            tuple(part.ids[0] for part in parts),
            tuple(part.arcs[0] for part in parts),
            sum((part.cost for part in parts), Fraction(0)),
            tuple(sum(values, Fraction(0)) for values in zip(*(part.rows for part in parts), strict=True)),
        )
        for parts in itertools.product(*single)
    ]


def _layers(table: Table, groups: Mapping[Any, Hashable] | None) -> dict[Hashable, list[int]]:
    """Indices of the positions of each layer, layers in order of first appearance."""
    if table.has_spans:
        raise RecipeError("This baseline needs one variant for each layer; leave out variants that span several.")
    layers: dict[Hashable, list[int]] = {}
    for index, position in enumerate(table.positions):
        layers.setdefault(_lookup(groups, position, position, "layer"), []).append(index)
    return layers


def _lookup(mapping: Mapping[Position, Hashable] | None, position: Position, default: Hashable, what: str) -> Hashable:
    if mapping is None:
        return default
    if position not in mapping:
        raise RecipeError(f"Position {position} of the table has no {what}; name one for each position.")
    return mapping[position]


def homogeneous(
    problem: Problem,
    column: str,
    target: float,
    groups: Mapping[Any, Hashable] | None = None,
    slots: Mapping[Any, Hashable] | None = None,
) -> Solution:
    """One choice for all layers, mixed to within 1 % below a target cost and never above it.

    Every slot has the same variant in all layers that have it, except that one slot (every slot, when one is not
    enough) mixes two variants that are neighbours in `column`, the cheaper one in evenly spaced layers. Among the
    mixes that meet the problem's limits and cost 99-100 % of `target` the best-scored one is taken; if there
    is none, the dearest one below.

    Args:
        column: the cost to match, such as a runtime.
        target: total of `column`, fixed part included, that the compared child has.
        groups, slots: the layer and the slot of each position; None makes each position a layer with one
            slot.

    Raises:
        InfeasibleError: every mix costs more than the target or breaks a limit.
        RecipeError: a target that is not positive, spans, or layers that do not share their slots and
            variants.
    """
    started = time.perf_counter()
    if not 0 < target < math.inf:
        raise RecipeError(f"The target for {column} is {target}; it must be a positive number.")
    matched = replace(problem, limits=(*problem.limits, Limit(column, maximum=target)))
    program = _one_sided(build_program(matched))
    layers = _layers(problem.table, groups)
    settings = [
        _slot_settings(problem.table, program, positions) for positions in _slot_positions(problem.table, layers, slots)
    ]
    one_mixed = (
        (slot, rest)
        for mixed, slot in enumerate(settings)
        for rest in itertools.product(
            *([s for s in other if s.uniform] for i, other in enumerate(settings) if i != mixed)
        )
    )
    best = _best_of(program, one_mixed)
    if best is None or best.far:
        best = _best_of(program, ((settings[0], rest) for rest in itertools.product(*settings[1:])))
    if best is None:
        raise InfeasibleError(
            f"No mix of two variants over all layers has {column} <= {target:g} within the other limits; "
            "raise the target or add cheaper variants."
        )
    return _solution(problem, program, best.arcs, started)


@dataclass(frozen=True, eq=False)
class _Setting:
    """The variants of one slot in every layer, and their summed cost and rows."""

    arcs: tuple[int, ...]
    uniform: bool
    cost: float
    rows: np.ndarray


def _slot_positions(
    table: Table, layers: Mapping[Hashable, list[int]], slots: Mapping[Any, Hashable] | None
) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for positions in layers.values():
        names = [_lookup(slots, table.positions[index], "", "slot") for index in positions]
        if len(set(names)) < len(names):
            raise RecipeError("The homogeneous baseline needs every slot at most once in a layer.")
        for name, index in zip(names, positions, strict=True):
            found.setdefault(name, []).append(index)
    return list(found.values())


def _slot_settings(table: Table, program: Program, positions: list[int]) -> list[_Setting]:
    """Each variant in all layers, and each pair of neighbours mixed in every proportion."""
    shared = [v for v in table.variants[positions[0]] if all(v in table.variants[p] for p in positions)]
    if not shared:
        raise RecipeError("The homogeneous baseline needs a variant that all layers share; the table has none.")
    arcs = {
        variant: np.array([program.chain.arcs_of(p).start + table.variants[p].index(variant) for p in positions])
        for variant in shared
    }
    price = program.rows[-1].values
    shared.sort(key=lambda variant: (float(price[arcs[variant]].sum()), variant))
    layer = np.arange(len(positions))
    picks = [(arcs[variant], True) for variant in shared]
    for cheap, dear in itertools.pairwise(shared):
        for count in range(1, len(positions)):
            is_cheap = (layer + 1) * count // len(positions) > layer * count // len(positions)
            picks.append((np.where(is_cheap, arcs[cheap], arcs[dear]), False))
    return [
        _Setting(
            tuple(pick.tolist()),
            uniform,
            float(program.cost[pick].sum()),
            np.array([row.values[pick].sum() for row in program.rows]),
        )
        for pick, uniform in picks
    ]


@dataclass(frozen=True, order=True)
class _Mix:
    """Settings of all slots; the least is the best."""

    far: bool
    """More than 1 % below the target."""
    key: float
    """Cost, or the distance below the target when far."""
    arcs: list[int]


def _best_of(program: Program, combinations: Iterable[tuple[list[_Setting], tuple[_Setting, ...]]]) -> _Mix | None:
    mixes = (_best_mix(program, slot, rest) for slot, rest in combinations)
    return min((mix for mix in mixes if mix is not None), default=None)


def _best_mix(program: Program, slot: list[_Setting], rest: tuple[_Setting, ...]) -> _Mix | None:
    """The best of one slot's settings beside given ones, exactly within every row; the target is the last."""
    base = np.array([row.fixed - row.upper for row in program.rows])
    base += sum((setting.rows for setting in rest), start=np.zeros(len(base)))
    excess = np.array([setting.rows for setting in slot]) + base
    cost = np.array([setting.cost for setting in slot]) + sum(setting.cost for setting in rest)
    far = excess[:, -1] < -0.01 * program.rows[-1].upper
    key = np.where(far, -excess[:, -1], cost)
    largest = np.array([np.abs(row.values).max() for row in program.rows])
    plausible = np.all(excess <= 1e-9 * (program.chain.length * largest + np.abs(base)), axis=1)
    for index in np.lexsort((key, far)):
        arcs = [arc for setting in (slot[index], *rest) for arc in setting.arcs]
        if plausible[index] and program.feasible(np.array(arcs)):
            return _Mix(bool(far[index]), float(key[index]), arcs)
    return None


def _solution(problem: Problem, program: Program, arcs: Iterable[int], started: float) -> Solution:
    choices = choices_of(problem, program, np.array(sorted(arcs)))
    costs = problem.costs(choices)
    seconds = time.perf_counter() - started
    return Solution(choices, costs[problem.objective], None, None, costs, "feasible", seconds)
