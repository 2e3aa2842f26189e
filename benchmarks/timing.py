"""Which statistic of a few repeats varies least: whole models timed in turns, as for the cost table.

Stacks and mixtures of the quickstart's variants are timed nine times each. Of any three repeats and any three others
each statistic makes two times for every model: the standard deviation of their logarithms' difference, over the square
root of two, is what one of them is off by. Reads runs/quickstart; wants a machine as busy as it usually is.
python benchmarks/timing.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from results import by_arithmetic, save

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.cost_fit import random_mixtures, uniform_models
from puzzle_nas.engines import ENGINES, undisturbed
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import probe_model
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of

MIXTURES, ROUNDS, REPEATS, DRAWS = 24, 9, 3, 400
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "fastest": min,
    "fastest_two_thirds": undisturbed,
}


@torch.inference_mode()
def times_ms() -> np.ndarray:
    """Of a request, [models, rounds]."""
    run = RunFolder(Path("runs/quickstart"))
    parent, shape = load_parent(run)
    recipe = open_run(run)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    specs = search_space_of(recipe, shape).kinds()
    models = uniform_models(shape, specs) | random_mixtures(shape, specs, MIXTURES, recipe.seed)
    placeholders: dict = {}
    probes = {n: parent if n == "parent" else probe_model(parent, a, placeholders) for n, a in models.items()}
    engine, (scenario,) = ENGINES[recipe.engine], recipe.traffic()
    with engine.loaded(probes, run.scratch("timing")) as loaded:
        rounds = [
            [
                engine.time_parts(model, scenario, recipe.costs.decode_steps_measured).total_ms(scenario)
                for model in loaded.values()
            ]
            for _ in range(ROUNDS)
        ]
    return np.array(rounds).T


def main() -> None:
    """Measure, print, keep."""
    times = times_ms()
    rng = np.random.default_rng(0)
    draws = [rng.permutation(ROUNDS)[: 2 * REPEATS].reshape(2, REPEATS) for _ in range(DRAWS)]
    figures: dict[str, float] = {"models": len(times)}
    for name, statistic in STATISTICS.items():
        both = np.log([[[statistic(list(row[part])) for row in times] for part in draw] for draw in draws])
        figures[f"relative_error_{name}"] = float((both[:, 0] - both[:, 1]).std(axis=1).mean() / np.sqrt(2))
        print(f"  {name:20s} {figures[f'relative_error_{name}']:.4f}")
    print("Written to", save(by_arithmetic("timing"), figures))


if __name__ == "__main__":
    main()
