"""Does the sum of replace-1-block scores say how good a child is?

Random architectures at several speed-ups: sums of scores against the real KL of the assembled child on other text (the
selection split). Nothing is refitted or distilled.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import RunArgument, opened, report, spearman
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.library import assemble
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.search import Limit, solve

BANDS = (1.1, 1.2, 1.35, 1.5, 1.7, 2.0)
PER_BAND = 10
NOISES = (0.3, 1.0, 3.0)
"""Scores are multiplied by exp(noise * normal) before the search: from near the best to nearly random."""


def random_children(found: ArchitectureSearch, rng: np.random.Generator) -> Iterator[tuple[float, Architecture]]:
    """(speed-up, architecture), spread over the frontier's range."""
    for speedup in BANDS:
        for number in range(PER_BAND):
            noise = NOISES[number % len(NOISES)]
            scores = {choice: score * np.exp(noise * rng.normal()) for choice, score in found.scores.items()}
            noisy = replace(found, scores=scores)
            problem = noisy.problem({"speedup": speedup})
            (limit,) = problem.limits
            assert limit.maximum is not None
            band = Limit(limit.column, minimum=0.98 * limit.maximum, maximum=limit.maximum)
            (solution,) = solve(replace(problem, limits=(band,)), gap=1e-3)
            yield speedup, noisy.architecture(solution)


def main(run: RunArgument = Path("runs/torch")) -> None:
    """Print each child, keep the figures."""
    folder = RunFolder(run)
    recipe, parent = opened(folder)
    found = ArchitectureSearch.load(recipe, folder)
    selection = ParentReference(parent, load_tokens(folder, "selection"))
    bands: dict[float, list[tuple[float, float]]] = {}
    linears: list[int] = []
    for speedup, architecture in random_children(found, np.random.default_rng(0)):
        pair = found.score_of(architecture), selection.compare(assemble(folder, parent, architecture)).kl_nats
        bands.setdefault(speedup, []).append(pair)
        linears.append(sum(spec.kind == "linear" for _, _, spec in architecture))
        print(f"{speedup:.2f}x  sum {pair[0]:7.3f}  real {pair[1]:7.3f}  {linears[-1]:2d} linear", flush=True)
    pairs = [pair for of_band in bands.values() for pair in of_band]
    ratios = [real / total for total, real in pairs]
    many = statistics.median(linears)
    few_linears = [ratio for ratio, count in zip(ratios, linears, strict=True) if count <= many]
    many_linears = [ratio for ratio, count in zip(ratios, linears, strict=True) if count > many]
    figures = {
        "architectures": len(pairs),
        "spearman_additive_vs_real": spearman(*zip(*pairs, strict=True)),
        "spearman_within_cost_band": statistics.mean(spearman(*zip(*band, strict=True)) for band in bands.values()),
        "real_over_additive_median": statistics.median(ratios),
        "real_over_additive_median_few_linears": statistics.median(few_linears),
        "real_over_additive_median_many_linears": statistics.median(many_linears),
    }
    report("scores", figures)
