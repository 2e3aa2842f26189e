"""Tokens per second of BLD, scoring and GKD on one GPU, each beside the rate of its matrix products alone.

Reads a run that was made there (benchmarks/general_gpu.yaml) and a child of it.
python benchmarks/gpu.py RUN CHILD [--compiled]: with it, GKD alone, with torch.compile on every layer
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import torch
from achieved import achieved, median_seconds
from results import save
from throughput import LAYER, STEPS, gkd, scoring, trained

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import shape_of
from puzzle_nas.library import read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_distillation import BlockTask, Job, Trainee

BLD_BATCH_TOKENS = (2_048, 8_192, 32_768)
BLD_BATCHES = 4
GKD_BATCH_TOKENS = (2_048, 8_192, 32_768)


def bld(run: RunFolder, parent: torch.nn.Module, recipe, batch_tokens: int, figures: dict[str, float]) -> None:
    """A step of every trained variant of one layer."""
    length = recipe.data.sequence_length
    tokens = load_tokens(run, "train")[: BLD_BATCHES * batch_tokens // length]
    activations = LayerActivations(parent, tokens, run.scratch("benchmark"))
    activations.climb_to(LAYER)
    block = parent.get_submodule(f"model.layers.{LAYER}")
    task = BlockTask(activations, block, "token", parent.dtype == torch.bfloat16)
    starts = {
        spec: read_variant(run.initial_variant(LAYER, spec.id), "build-library")
        for layer, _, spec in search_space_of(recipe, shape_of(parent.config))
        if layer == LAYER and trained(run, spec)
    }
    trainees = [
        Trainee(Job((spec,), Path(), dict, {}), start, parent, block, recipe.bld, STEPS)
        for spec, start in starts.items()
    ]
    batches = itertools.cycle(torch.arange(len(tokens)).split(batch_tokens // length))

    def step() -> None:
        batch = task.fetch(next(batches))
        for trainee in trainees:
            loss = task.loss(trainee, batch)
            loss.item()
            loss.backward()
            trainee.optimiser.step(0)

    done = achieved(step)
    figures[f"bld_fraction_of_matmul_rate_{batch_tokens}_tokens_a_step"] = done.fraction
    figures[f"bld_variant_tokens_per_second_{batch_tokens}_tokens_a_step"] = batch_tokens * len(trainees) / done.seconds
    figures[f"bld_milliseconds_a_variant_{batch_tokens}_tokens_a_step"] = 1e3 * done.seconds / len(trainees)
    activations.delete()


def main() -> None:
    """Measure, print, keep."""
    run = RunFolder(Path(sys.argv[1]))
    recipe = open_run(run)
    parent, shape = load_parent(run)
    checkpoint = Path(sys.argv[2])

    def gkd_step(batch_tokens: int, compiled: bool = False):
        settings = recipe.model_copy(update={"gkd": recipe.gkd.model_copy(update={"batch_tokens": batch_tokens})})
        return gkd(run, parent, settings, checkpoint, compiled)

    if "--compiled" in sys.argv:
        torch._dynamo.config.recompile_limit = 64
        largest = max(GKD_BATCH_TOKENS)
        begin = time.perf_counter()
        work = gkd_step(largest, compiled=True)
        work()
        print(f"  compiled in {time.perf_counter() - begin:.0f} s")
        seconds = median_seconds({"step": work})["step"]
        print("Written to", save("gpu_compiled", {f"gkd_tokens_per_second_{largest}_tokens_a_step": largest / seconds}))
        print(largest / seconds)
        return
    figures: dict[str, float] = {}
    for batch_tokens in BLD_BATCH_TOKENS:
        bld(run, parent, recipe, batch_tokens, figures)
    sequences = recipe.scoring.batch_tokens // recipe.data.sequence_length
    done = achieved(scoring(run, parent, search_space_of(recipe, shape), recipe, sequences))
    figures["scoring_fraction_of_matmul_rate"] = done.fraction
    figures["scoring_teraflops_per_second"] = done.flops / done.seconds / 1e12
    for batch_tokens in GKD_BATCH_TOKENS:
        done = achieved(gkd_step(batch_tokens))
        figures[f"gkd_fraction_of_matmul_rate_{batch_tokens}_tokens_a_step"] = done.fraction
        figures[f"gkd_tokens_per_second_{batch_tokens}_tokens_a_step"] = batch_tokens / done.seconds
        figures[f"gkd_matmul_teraflops_per_second_{batch_tokens}_tokens_a_step"] = done.matmul_flops_per_second / 1e12
    for name, value in figures.items():
        print(f"  {name:75s} {value:14.3f}")
    print("Written to", save("gpu_rates", figures))


if __name__ == "__main__":
    main()
