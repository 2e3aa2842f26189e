"""Does the sum of replace-1-block scores say how good a child is, and what does measuring children add?

Part 1: random architectures at several speed-ups, sums of scores against the real KL of the assembled child on other
text (the selection split). Part 2, at three speed-ups, by KL alone: the search's own choice, the best of six diverse
ones measured (search.verify), a round of refinement (search.refine_rounds), and the search on scores of whole blocks
(scoring.unit); all chosen on the selection split and reported on validation. Nothing is distilled. Reads
runs/torch.
python benchmarks/scores.py [SPEEDUP ...]
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from results import RESULTS, save

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.choosing.refinement import Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe, RefitSettings, SearchSettings
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.search import Limit, solve
from puzzle_nas.stages import score_blocks
from puzzle_nas.stages.search_architecture import TRIED_ON

BANDS = (1.1, 1.2, 1.35, 1.5, 1.7, 2.0)
PER_BAND = 10
NOISES = (0.3, 1.0, 3.0)
"""Scores are multiplied by exp(noise * normal) before the search: from near the best to nearly random."""
SPEEDUPS = (1.25, 1.5, 2.0)


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def random_children(found: ArchitectureSearch, rng: np.random.Generator):
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


def additivity(found: ArchitectureSearch, trials: Trials) -> dict[str, float]:
    """Part 1."""
    rows = []
    for speedup, architecture in random_children(found, np.random.default_rng(0)):
        real = trials.kl_nats(architecture)
        changed = [spec for layer, _, spec in architecture if not found.space.is_parents((layer, (spec,)))]
        linears = sum(spec.kind == "linear" for spec in changed)
        rows.append((speedup, found.score_of(architecture), real, len(changed), linears))
        print("{:.2f}x  sum {:7.3f}  real {:7.3f}  {:2d} changes, {:2d} of them linear".format(*rows[-1]), flush=True)
    sums, reals = [row[1] for row in rows], [row[2] for row in rows]
    in_bands = [spearman(*zip(*[row[1:3] for row in rows if row[0] == band], strict=True)) for band in BANDS]
    ratios = [real / total for total, real in zip(sums, reals, strict=True)]
    many_linears = [
        r for r, row in zip(ratios, rows, strict=True) if row[4] > statistics.median(row[4] for row in rows)
    ]
    few_linears = [
        r for r, row in zip(ratios, rows, strict=True) if row[4] <= statistics.median(row[4] for row in rows)
    ]
    _, axis = plt.subplots(figsize=(6, 5))
    for band in BANDS:
        axis.scatter(*zip(*[row[1:3] for row in rows if row[0] == band], strict=True), s=16, label=f"{band}x")
    ends = [min(sums), max(sums)]
    axis.plot(ends, ends, color="grey", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="sum of scores, nats", ylabel="KL of the assembled child, nats")
    axis.legend(title="speed-up")
    plt.tight_layout()
    plt.savefig(RESULTS / "scores.png", dpi=100)
    return {
        "architectures": len(rows),
        "spearman_additive_vs_real": spearman(sums, reals),
        "spearman_within_cost_band": statistics.mean(in_bands),
        "real_over_additive_median": statistics.median(ratios),
        "real_over_additive_median_few_linears": statistics.median(few_linears),
        "real_over_additive_median_many_linears": statistics.median(many_linears),
    }


def scored_by_block(recipe: Recipe, run: RunFolder) -> ArchitectureSearch:
    """The run's search with scores of whole blocks, taken in a folder of its own."""
    folder = RunFolder(Path("runs/benchmark-scores"))
    folder.path.mkdir(parents=True, exist_ok=True)
    for item in run.path.iterdir():
        if item.name not in ("scores", "search") and not (folder / item.name).exists():
            (folder / item.name).symlink_to(item.resolve())
    settings = recipe.model_copy(update={"scoring": recipe.scoring.model_copy(update={"unit": "block"})})
    score_blocks.run(settings, folder)
    return ArchitectureSearch.load_with(CostTable.load_mixes(folder, settings)[0], settings, folder)


def main() -> None:
    """Print both parts, keep the figures, draw the first."""
    run = RunFolder(Path("runs/torch"))
    recipe = open_run(run)
    parent = load_parent(recipe, run)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    found = ArchitectureSearch.load(recipe, run)
    splits = {split: load_tokens(run, split) for split in TRIED_ON}
    unrefitted = recipe.model_copy(update={"refit": RefitSettings(enabled=False)})
    trials = Trials(run, parent, unrefitted, splits)
    figures = additivity(found, trials)
    for name, value in figures.items():
        print(f"{name:40s} {value:.3f}")
    validation = ParentReference(parent, load_tokens(run, "validation"))

    def validation_kl(architecture) -> float:
        return validation.compare(assemble(run, parent, architecture)).kl_nats

    by_block = scored_by_block(recipe, run)
    gaps = [
        score - sum(found.scores[layer, (spec,)] for spec in specs)
        for (layer, specs), score in by_block.scores.items()
        if score and not any(found.space.is_parents((layer, (spec,))) for spec in specs)
    ]
    sums = [score for score in by_block.scores.values() if score]
    figures["block_score_less_sum_of_sub_blocks_mean_nats"] = statistics.mean(gaps)
    figures["block_score_mean_nats"] = statistics.mean(sums)
    print(
        f"Two variants in one block: block score less the sum of the two {statistics.mean(gaps):+.4f} nats in the mean"
    )
    ways = (
        ("additive", found, SearchSettings()),
        ("verified", found, SearchSettings(verify=6)),
        ("refined", found, SearchSettings(verify=6, refine_rounds=1)),
        ("by_block", by_block, SearchSettings()),
    )
    print(f"{'validation KL, nats':20s}" + "".join(f"{way:>11s}" for way, _, _ in ways))
    for speedup in map(float, sys.argv[1:]) if sys.argv[1:] else SPEEDUPS:
        limits = {"speedup": speedup}
        kl = {}
        for way, scores, settings in ways:
            kl[way] = validation_kl(Refinement((scores,), settings, trials).best(limits))
            figures[f"validation_kl_nats_{way}.{speedup}x"] = round(kl[way], 4)
        for way in ("verified", "refined", "by_block"):
            figures[f"real_kl_{way}_over_additive.{speedup}x"] = round(kl[way] / kl["additive"], 4)
        print(f"{speedup:19.2f}x" + "".join(f"{value:11.3f}" for value in kl.values()), flush=True)
    print("Written to", save("scores", figures), "and", RESULTS / "scores.png")


if __name__ == "__main__":
    main()
