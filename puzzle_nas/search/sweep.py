"""Layer by layer, keeping only the partial choices with the best bounds: a dynamic program of limited width.

A partial choice is bounded by Lagrangian relaxation (Geoffrion, 1974): its cost so far plus, for the layers that are
left, the least of cost plus priced rows. Every price vector gives a bound, and the largest counts: prices of the linear
relaxation with the bounds of its rows moved a little serve the choices that have used much of one row and little of
another. Where nothing promising had to be dropped for want of width, the result is proven.
"""

from __future__ import annotations

import math
import time

import numpy as np

from puzzle_nas.search.program import Program

MOST_EXTENSIONS = 4_000_000
"""Partial choices times arcs of a layer, at most: what memory must hold."""
ROUNDING = 1e-12


def sweep(
    program: Program, prices: np.ndarray, width: int, threshold: float, deadline: float
) -> tuple[np.ndarray | None, float]:
    """The cheapest path found that meets every row, and a bound on what it may have missed.

    Args:
        program: without spans.
        prices: `(K, rows)`, of scaled rows; positive for upper bounds, negative for lower ones.
        width: partial choices to keep.
        threshold: paths that cost more are of no interest and may be missed.

    Returns:
        The path or None, and the least bound among what was dropped for want of width; infinite when nothing was, so
        that only paths dearer than `threshold` can have been missed. When time runs out, None and minus infinity.
    """
    matrix, lower, upper = program.scaled_rows
    layers = [program.chain.arcs_of(position) for position in range(program.chain.length)]
    priced = program.cost + prices @ matrix
    bounds = -(prices * np.where(prices > 0, upper, np.where(prices < 0, lower, 0.0))).sum(axis=1)
    for layer in layers:
        least = priced[:, layer].min(axis=1)
        priced[:, layer] -= least[:, None]
        bounds += least
    slack = ROUNDING * (abs(threshold) if math.isfinite(threshold) else 1.0) + ROUNDING * float(np.abs(bounds).max())
    rest_least = np.array([matrix[:, layer].min(axis=1) for layer in layers])
    rest_most = np.array([matrix[:, layer].max(axis=1) for layer in layers])
    left_least, left_most = rest_least.sum(axis=0), rest_most.sum(axis=0)
    bounds, used = bounds[:, None], np.zeros((len(matrix), 1))
    taken: list[tuple[int, np.ndarray, np.ndarray]] = []
    dropped = math.inf
    # Layers in which a second variant is nearly as good come last: they fit the rest to the limits.
    for position in sorted(range(len(layers)), key=lambda position: -_runner_up(priced[0, layers[position]])):
        if time.monotonic() >= deadline:
            return None, -math.inf
        layer = layers[position]
        num_arcs = layer.stop - layer.start
        left_least, left_most = left_least - rest_least[position], left_most - rest_most[position]
        bound = np.full((bounds.shape[1], num_arcs), -np.inf)
        for one, extra in zip(bounds, priced[:, layer], strict=True):
            np.maximum(bound, one[:, None] + extra, out=bound)
        kept = bound <= threshold + slack
        for row in range(len(matrix)):
            total = used[row][:, None] + matrix[row, layer]
            kept &= total <= upper[row] - left_least[row] + ROUNDING * len(layers)
            kept &= total >= lower[row] - left_most[row] - ROUNDING * len(layers)
        chosen = np.flatnonzero(kept)
        if len(chosen) > width:
            order = np.argpartition(bound.flat[chosen], width)
            dropped = min(dropped, float(bound.flat[chosen[order[width:]]].min()))
            chosen = chosen[order[:width]]
        if not len(chosen):
            return None, dropped - slack
        parents, arcs = np.divmod(chosen, num_arcs)
        arcs += layer.start
        bounds, used = bounds[:, parents] + priced[:, arcs], used[:, parents] + matrix[:, arcs]
        taken.append((position, parents, arcs))
    return _cheapest(program, taken, bounds[0] - prices[0] @ used), dropped - slack


def _runner_up(excess: np.ndarray) -> float:
    return float(np.partition(excess, 1)[1]) if len(excess) > 1 else math.inf


def _cheapest(program: Program, taken: list[tuple[int, np.ndarray, np.ndarray]], cost: np.ndarray) -> np.ndarray | None:
    """The first of the complete choices, from cheap to dear, that meets every row exactly."""
    for state in np.argsort(cost, kind="stable"):
        path = np.empty(program.chain.length, np.int64)
        for position, parents, arcs in reversed(taken):
            path[position] = arcs[state]
            state = parents[state]
        if program.feasible(path):
            return path
    return None
