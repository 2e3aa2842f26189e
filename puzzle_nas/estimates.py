"""Means with their uncertainty: standard errors, intervals of shares and of paired ratios. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
ONE_SIDED_95 = 1.644854
RESAMPLES = 2_000


def finite(value: float) -> float | None:
    """A number that JSON has, else None."""
    return value if math.isfinite(value) else None


def estimate(values: Any) -> dict[str, float | None]:
    """Mean and standard error of independent values, None for what is not finite; one value has no standard error."""
    array = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
        return {"mean": finite(float(array.mean())), "standard_error": finite(error)}


def exponential(of: dict[str, float | None]) -> dict[str, float | None]:
    """exp of an estimate; the standard error to first order."""
    mean, error = of["mean"], of["standard_error"]
    assert mean is not None
    value = math.exp(min(mean, 700.0))
    return {"mean": value, "standard_error": None if error is None else value * error}


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of the mean of `count` values between 0 and 1 (Wilson's; wide where values are not 0 or 1)."""
    z2 = NORMAL_95**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def above(values: Any, level: Any) -> bool:
    """Whether the mean of `values` is above that of `level`, item by item: by a one-sided 95 % interval."""
    of = estimate(np.asarray(values, np.float64) - np.asarray(level, np.float64))
    assert of["mean"] is not None
    return of["mean"] > ONE_SIDED_95 * (of["standard_error"] or 0.0)


def resampled_ratio(child: Any, parent: Any, seed: int) -> np.ndarray:
    """[RESAMPLES] ratios of mean child to mean parent value, items drawn with replacement, both models' together."""
    child, parent = np.asarray(child, np.float64), np.asarray(parent, np.float64)
    generator = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = generator.integers(0, len(child), len(child))
        below = parent[drawn].mean()
        ratios[number] = child[drawn].mean() / below if below > 0 else np.nan
    return ratios


def preserved(pairs: Sequence[tuple[Any, Any]], seed: int = 0) -> dict[str, float | None]:
    """Mean over tasks of child's over parent's mean, with a 95 % interval (paired bootstrap over the items of each).

    Args:
        pairs: for each task the child's and the parent's values of the same items; the parent's mean is above 0.
    """
    ratios = [float(np.mean(child) / np.mean(parent)) for child, parent in pairs]
    resampled = np.mean([resampled_ratio(*pair, seed + place) for place, pair in enumerate(pairs)], axis=0)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return {"mean": float(np.mean(ratios)), "low": float(low), "high": float(high)}
