"""A good choice in milliseconds: round the relaxation, repair what breaks limits, improve by swaps."""

from __future__ import annotations

import numpy as np

from puzzle_nas.search.program import Program

MAX_SWAPS = 2000
ROUNDING = 1e-13
MOST_PAIRED = 1500
"""Swaps of which pairs are tried."""


def find_path(program: Program, likely: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """A path that meets every row, or None when swaps alone do not find one.

    Args:
        likely: how much of each arc the linear relaxation takes.
        lengths: cost plus priced rows, at the relaxation's prices.
    """
    found: list[np.ndarray] = []
    for path in (program.chain.shortest_path(-likely), program.chain.shortest_path(lengths)):
        repaired = _repair(program, path, lengths)
        if repaired is not None:
            found.append(improve(program, repaired))
    found = [path for path in found if program.feasible(path)]
    return min(found, key=program.score, default=None)


class _Swaps:
    """All ways to exchange one arc of a path for another with the same ends."""

    def __init__(self, program: Program, path: np.ndarray):
        self.program, self.path = program, path.copy()
        self.matrix, self.lower, self.upper = program.scaled_rows
        self.totals = self.matrix[:, path].sum(axis=1)
        self.place = np.full(program.chain.length, -1)
        self.place[program.chain.start[path]] = np.arange(len(path))
        present = self.place[program.chain.start]
        self.arcs = np.flatnonzero((present >= 0) & (program.chain.span == program.chain.span[path[present]]))
        self.arc_place = present[self.arcs]

    def changes(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Change of length and new row totals of every swap."""
        old = self.path[self.arc_place]
        totals = self.totals[:, None] + self.matrix[:, self.arcs] - self.matrix[:, old]
        return lengths[self.arcs] - lengths[old], totals

    def violation(self, totals: np.ndarray) -> np.ndarray:
        """By how much row totals, `(rows, ...)`, lie outside the bounds, summed over the rows."""
        over, under = totals.T - self.upper, self.lower - totals.T
        return np.maximum(np.maximum(over, under), 0.0).sum(axis=-1)

    def take(self, swap: int) -> None:
        """Make one swap."""
        new, place = self.arcs[swap], self.arc_place[swap]
        self.totals += self.matrix[:, new] - self.matrix[:, self.path[place]]
        self.path[place] = new


def _repair(program: Program, path: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Swap, at the least priced cost per unit of violation mended, until every row holds."""
    swaps = _Swaps(program, path)
    for _ in range(MAX_SWAPS):
        broken = float(swaps.violation(swaps.totals))
        if broken <= 0:
            return swaps.path
        change, totals = swaps.changes(lengths)
        mended = broken - swaps.violation(totals)
        useful = mended > 1e-12 * max(1.0, broken)
        if not useful.any():
            return None
        swaps.take(int(np.argmin(np.where(useful, np.maximum(change, 0) / np.where(useful, mended, 1), np.inf))))
    return None


def improve(program: Program, path: np.ndarray) -> np.ndarray:
    """Take the swap, or the two at once, that lower the cost most while every row holds, until there are none."""
    swaps = _Swaps(program, path)
    for _ in range(MAX_SWAPS):
        before = swaps.path.copy()
        change, totals = swaps.changes(program.cost)
        allowed = (swaps.violation(totals) <= ROUNDING) & (change < 0)
        if allowed.any():
            swaps.take(int(np.argmin(np.where(allowed, change, np.inf))))
        elif (pair := _best_pair(swaps, change, totals)) is not None:
            for swap in pair:
                swaps.take(swap)
        else:
            break
        if not program.feasible(swaps.path):
            return before
    return swaps.path


def _best_pair(swaps: _Swaps, change: np.ndarray, totals: np.ndarray) -> tuple[int, int] | None:
    """The two swaps in different places that together lower the cost most while every row holds."""
    if len(change) > MOST_PAIRED:
        return None
    both = change[:, None] + change
    allowed = (both < -ROUNDING * np.abs(change).max(initial=0.0)) & (swaps.arc_place[:, None] != swaps.arc_place)
    for row, total in enumerate(totals):
        after = total[:, None] + (total - swaps.totals[row])
        allowed &= (after <= swaps.upper[row] + ROUNDING) & (after >= swaps.lower[row] - ROUNDING)
    if not allowed.any():
        return None
    first, second = np.unravel_index(np.argmin(np.where(allowed, both, np.inf)), both.shape)
    return int(first), int(second)
