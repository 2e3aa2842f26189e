"""The dynamic program of limited width: what it finds, and what it says about the rest."""

import itertools
import math

import numpy as np
import pytest

from puzzle_nas.search.program import Chain, Program, Row
from puzzle_nas.search.sweep import sweep

LAYERS, VARIANTS = 6, 4


def random_program(random):
    """Whole numbers, so that many paths cost the same, one row with an upper bound and one with both."""
    cost, memory, runtime = random.integers(0, 9, (3, LAYERS * VARIANTS)).astype(float)
    mean = 4.0 * LAYERS
    rows = (Row(memory, upper=mean - random.integers(8)), Row(runtime, lower=mean - 4, upper=mean - random.integers(5)))
    chain = Chain(np.repeat(np.arange(LAYERS), VARIANTS), np.ones(LAYERS * VARIANTS, np.int64), LAYERS)
    return Program(chain, cost, rows)


def cheapest(program):
    """By trying every path; infinite when none meets the rows."""
    paths = (np.array(p) + VARIANTS * np.arange(LAYERS) for p in itertools.product(range(VARIANTS), repeat=LAYERS))
    return min((program.score(path) for path in paths if program.feasible(path)), default=math.inf)


@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_bounds_what_it_does_not_find(seed):
    random = np.random.default_rng(seed)
    program = random_program(random)
    expected = cheapest(program)
    prices = random.uniform(0, 30, (3, 2)) * [1, random.choice([-1, 1])]
    for width in (1, 5, 50, VARIANTS**LAYERS):
        path, least = sweep(program, prices, width, math.inf, math.inf)
        found = math.inf if path is None else program.score(path)
        assert path is None or program.feasible(path)
        assert min(found, least) <= expected <= found
    assert found == expected and least == math.inf
    _, least = sweep(program, prices, width, expected - 0.5, math.inf)
    assert least == math.inf


def test_a_sweep_that_runs_out_of_time_proves_nothing():
    program = random_program(np.random.default_rng(0))
    assert sweep(program, np.zeros((1, 2)), 10, math.inf, -math.inf) == (None, -math.inf)
