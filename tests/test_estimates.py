"""Means with their uncertainty."""

import math

import numpy as np
import pytest

from puzzle_nas.estimates import above, estimate, preserved, wilson_interval


def test_mean_and_standard_error():
    values = np.array([1.0, 2.0, 4.0])
    assert estimate(values) == {
        "mean": pytest.approx(7 / 3),
        "standard_error": pytest.approx(values.std(ddof=1) / 3**0.5),
    }
    assert estimate([2.0]) == {"mean": 2.0, "standard_error": None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_neither(bad):
    assert estimate([1.0, bad]) == {"mean": None, "standard_error": None}


def test_shares_and_ratios():
    low, high = wilson_interval(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson_interval(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    hits = np.array([1.0] * 60 + [0.0] * 40)
    assert above(hits, np.full(100, 0.5)) and not above(hits, np.full(100, 0.53))
    same = preserved([(hits, hits)])
    assert same == {"mean": 1.0, "low": 1.0, "high": 1.0}
    worse = preserved([(hits * (np.arange(100) % 5 > 0), hits)])
    assert worse["mean"] == pytest.approx(0.8) and 0.68 < worse["low"] < 0.8 < worse["high"] < 0.92
