"""A problem as arrays: arcs along the chain of positions and rows of limits.

Every variant is an arc from its position to the one after those it covers; a choice is a path from the first
position to the end, and limits are rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from puzzle_nas.search.problem import Position, Problem


@dataclass(frozen=True, eq=False)
class Row:
    """`lower <= values @ x + fixed <= upper`, in the user's numbers; infinite where there is no bound."""

    values: np.ndarray
    lower: float = -math.inf
    upper: float = math.inf
    fixed: float = 0.0

    def excess(self, chosen: np.ndarray) -> float:
        """By how much a choice breaks the row, correctly rounded: positive if and only if it is broken."""
        terms = [*self.values[chosen].tolist(), self.fixed]
        above = math.fsum([*terms, -self.upper]) if self.upper < math.inf else -math.inf
        below = -math.fsum([*terms, -self.lower]) if self.lower > -math.inf else -math.inf
        return max(above, below)

    def ends(self) -> list[Row]:
        """The same as rows with an upper bound only, signs turned where it is a lower bound."""
        rows = []
        if self.upper < math.inf:
            rows.append(replace(self, lower=-math.inf))
        if self.lower > -math.inf:
            rows.append(Row(-self.values, upper=-self.lower, fixed=-self.fixed))
        return rows


@dataclass(frozen=True, eq=False)
class Chain:
    """Arcs sorted by the position at which they start."""

    start: np.ndarray
    span: np.ndarray
    length: int

    @cached_property
    def end(self) -> np.ndarray:
        """Position after the arc."""
        return self.start + self.span

    @cached_property
    def _first(self) -> np.ndarray:
        return np.searchsorted(self.start, np.arange(self.length + 1))

    @cached_property
    def has_spans(self) -> bool:
        """Whether some arc covers more than one position."""
        return bool((self.span > 1).any())

    @cached_property
    def connected(self) -> bool:
        """Whether some path leads from the first position to the end."""
        reached = np.arange(self.length + 1) == 0
        for position in range(self.length):
            if reached[position]:
                reached[self.end[self.arcs_of(position)]] = True
        return bool(reached[-1])

    def arcs_of(self, position: int) -> slice:
        """The arcs that start at a position."""
        return slice(int(self._first[position]), int(self._first[position + 1]))

    def subset(self, kept: np.ndarray) -> Chain:
        """The chain with only some of the arcs."""
        return Chain(self.start[kept], self.span[kept], self.length)

    def potentials(self, lengths: np.ndarray) -> np.ndarray:
        """Least length of a span-1 arc at each position (0 where there is none)."""
        least = np.full(self.length, np.inf)
        single = self.span == 1
        np.minimum.at(least, self.start[single], lengths[single])
        return np.where(np.isfinite(least), least, 0.0)

    def above(self, potentials: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Lengths less the potentials of the positions covered: every path loses the same, their sum."""
        if not self.has_spans:
            return lengths - potentials[self.start]
        total = np.concatenate([[0.0], np.cumsum(potentials)])
        return np.where(
            self.span == 1, lengths - potentials[self.start], lengths - (total[self.end] - total[self.start])
        )

    def shortest(self, lengths: np.ndarray) -> tuple[float, np.ndarray]:
        """Length of the shortest path, and for each arc how much longer the best path through it is."""
        if not self.has_spans:
            least = self.potentials(lengths)
            return float(least.sum()), lengths - least[self.start]
        forward, backward = np.full(self.length + 1, np.inf), np.full(self.length + 1, np.inf)
        forward[0] = backward[-1] = 0.0
        for position in range(self.length):
            arcs = self.arcs_of(position)
            np.minimum.at(forward, self.end[arcs], forward[position] + lengths[arcs])
        for position in reversed(range(self.length)):
            arcs = self.arcs_of(position)
            backward[position] = np.min(lengths[arcs] + backward[self.end[arcs]], initial=np.inf)
        value = float(forward[-1])
        return value, forward[self.start] + lengths + backward[self.end] - value

    def shortest_path(self, lengths: np.ndarray) -> np.ndarray:
        """The arcs of a shortest path, in order; the first of equals."""
        through = self.shortest(lengths)[1] if self.has_spans else lengths
        path, position = [], 0
        while position < self.length:
            arcs = self.arcs_of(position)
            path.append(arcs.start + int(np.argmin(through[arcs])))
            position = int(self.end[path[-1]])
        return np.array(path)


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise `cost @ x` over paths of the chain within rows."""

    chain: Chain
    cost: np.ndarray
    rows: tuple[Row, ...]

    def subset(self, kept: np.ndarray) -> Program:
        """The program with only some of the arcs."""
        rows = tuple(replace(row, values=row.values[kept]) for row in self.rows)
        return Program(self.chain.subset(kept), self.cost[kept], rows)

    def feasible(self, chosen: np.ndarray) -> bool:
        """Whether a path meets every row, in exact arithmetic."""
        return all(row.excess(chosen) <= 0 for row in self.rows)

    def score(self, chosen: np.ndarray) -> float:
        """Cost of a path, correctly rounded."""
        return math.fsum(self.cost[chosen].tolist())

    @cached_property
    def scaled_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows less their potentials, the largest coefficient 1: matrix `(rows, arcs)`, lower, upper."""
        matrix, lower, upper = np.zeros((len(self.rows), len(self.cost))), [], []
        for index, row in enumerate(self.rows):
            potentials = self.chain.potentials(row.values)
            values = self.chain.above(potentials, row.values)
            scale = float(np.abs(values).max()) or 1.0
            matrix[index] = values / scale
            taken = [-row.fixed, *(-potentials).tolist()]
            lower.append(math.fsum([row.lower, *taken]) / scale)
            upper.append(math.fsum([row.upper, *taken]) / scale)
        return matrix, np.array(lower), np.array(upper)

    def binding(self) -> Program:
        """The program without the bounds that every path meets."""
        rows = []
        for row in self.rows:
            ends = [end for end in row.ends() if end.excess(self.chain.shortest_path(-end.values)) > 0]
            if len(ends) == 1:
                rows += ends
            elif ends:
                rows.append(row)
        return Program(self.chain, self.cost, tuple(rows))

    def possible(self) -> np.ndarray:
        """Mask of the arcs through which some path meets each row taken alone."""
        keep = np.ones(len(self.cost), bool)
        for end in (end for row in self.rows for end in row.ends()):
            least, through = self.chain.shortest(end.values)
            rounding = 1e-13 * self.chain.length * float(np.abs(end.values).max())
            keep &= least + through + end.fixed - end.upper <= rounding
        return keep

    def undominated(self) -> np.ndarray:
        """Mask of the arcs that none with the same ends equals or beats in cost and every row.

        Among equals the first is kept. Replacing a dominated arc never breaks a row, so the optimum stays.
        """
        table = np.vstack([self.cost, *(end.values for row in self.rows for end in row.ends())])
        keep = np.ones(len(self.cost), bool)
        for position in range(self.chain.length):
            arcs = np.arange(len(keep))[self.chain.arcs_of(position)]
            for span in np.unique(self.chain.span[arcs]):
                same = arcs[self.chain.span[arcs] == span]
                order = same[np.lexsort(table[::-1, same])]
                keep[order] = _pareto(table[:, order])
        return keep


def _pareto(sorted_table: np.ndarray) -> np.ndarray:
    """Mask of the columns that no earlier column is <= in every entry; columns sorted lexicographically."""
    # The first row is sorted; whatever a dominated column dominates, its dominator does too.
    count, block = sorted_table.shape[1], 256
    keep = np.ones(count, bool)
    for start in range(0, count, block):
        stop = min(count, start + block)
        beaten = np.arange(stop)[:, None] < np.arange(start, stop)
        for row in sorted_table[1:]:
            beaten &= row[:stop, None] <= row[start:stop]
        keep[start:stop] = ~beaten.any(axis=0)
    return keep


def build_program(problem: Problem) -> Program:
    """The arrays of a problem."""
    table = problem.table
    spans = np.concatenate(table.spans).astype(np.int64)
    start = np.repeat(np.arange(len(table.positions)), [len(variants) for variants in table.variants])
    values = np.concatenate(table.column(problem.objective))
    cost = values if problem.sense == "minimise" else -values
    return Program(Chain(start, spans, len(table.positions)), cost, limit_rows(problem))


def limit_rows(problem: Problem) -> tuple[Row, ...]:
    """The limits of a problem, one row each."""
    return tuple(
        Row(
            np.concatenate(problem.table.column(limit.column)),
            -math.inf if limit.minimum is None else float(limit.minimum),
            math.inf if limit.maximum is None else float(limit.maximum),
            float(problem.fixed.get(limit.column, 0.0)),
        )
        for limit in problem.limits
    )


def choices_of(problem: Problem, program: Program, chosen: np.ndarray) -> dict[Position, str]:
    """Names of the chosen arcs of an unreduced program."""
    result = {}
    for arc in chosen:
        position = int(program.chain.start[arc])
        variant = int(arc) - program.chain.arcs_of(position).start
        result[problem.table.positions[position]] = problem.table.variants[position][variant]
    return result
