"""FLOP/s of BLD, scoring and GKD over the machine's rate for the same products.

BLD: all trained variants of one layer, one step each, with their share of computing the parent's activations. Scoring:
all variants of one layer, on what prefix reuse leaves. GKD: a step of the quickstart's assembled child, as it is and
with gkd.compile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from achieved import Achieved, achieved, median_seconds
from transformers import PreTrainedModel

from puzzle_nas.architecture import SearchSpace, Spec
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import architecture_of, load_model, load_parent
from puzzle_nas.library import block_subblocks, read_variant
from puzzle_nas.machine import machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.subblocks import Weights, windows_of
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Trainee
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent

LAYER = 14
BATCH_TOKENS = (512, 2048)
"""The quickstart's, and the default."""
TRAIN_SEQUENCES, SCORING_SEQUENCES = 80, 4
STEPS_A_TURN = 8
"""Of BLD: its weights and moments then stay in cache, as they do in a run."""
STEPS = 1000
"""Where schedules end; no more than a few are taken."""


def bld(run: RunFolder, parent: PreTrainedModel, space: SearchSpace, recipe: Recipe) -> Iterator[tuple[str, float]]:
    """Both batch sizes."""
    specs = space.variants(LAYER)
    tokens = load_tokens(run, "train")[:TRAIN_SEQUENCES]
    activations = LayerActivations(parent, tokens, run.scratch("benchmark"), windows_of(specs))
    activations.climb_to(LAYER)
    task = BlockTask(activations, "token", parent.dtype == torch.bfloat16)
    x = activations.x.tensor.clone()
    compute = achieved(lambda: (activations.compute(), activations.advance()))
    activations.x.tensor.copy_(x)
    activations.compute()
    starts = {spec: read_variant(run.initial_variant(LAYER, spec.id), "build-library") for spec in specs}
    trained = {spec: start for spec, start in starts.items() if start}
    for size in BATCH_TOKENS:
        step = _step(task, parent, recipe, trained, tokens, size)

        def turn(step: Callable[[], None] = step) -> None:
            for _ in range(STEPS_A_TURN):
                step()

        now, share = achieved(step), size / tokens.numel()
        seconds = median_seconds({"turn": turn})["turn"] / STEPS_A_TURN + share * compute.seconds
        flops = now.flops + share * compute.flops
        ideal = now.flops / now.matmul_flops_per_second + share * compute.flops / compute.matmul_flops_per_second
        name = f"_{size}_tokens_a_step"
        yield "bld_fraction_of_matmul_rate" + name, ideal / seconds
        yield "bld_gflops_per_second" + name, flops / seconds / 1e9
        yield "bld_tokens_per_second" + name, size * len(trained) / seconds
        yield "bld_matmul_gflops_per_second" + name, flops / ideal / 1e9
    # That of the default.
    yield "bld_fraction_of_matmul_rate", ideal / seconds
    activations.delete()


def _step(
    task: BlockTask,
    parent: PreTrainedModel,
    recipe: Recipe,
    starts: dict[Spec, Weights],
    tokens: torch.Tensor,
    batch_tokens: int,
) -> Callable[[], None]:
    trainees = [
        Trainee(Job((spec,), Path(), dict, {}), start, parent, LAYER, recipe.bld, STEPS)
        for spec, start in starts.items()
    ]
    batches = itertools.cycle(torch.arange(len(tokens)).split(batch_tokens // tokens.shape[1]))

    def step() -> None:
        batch = task.fetch(next(batches))
        for trainee in trainees:
            task.update(trainee, batch, trainee.optimiser.rate_at(0))

    return step


def scoring(run: RunFolder, parent: PreTrainedModel, space: SearchSpace, recipe: Recipe) -> Callable[[], object]:
    """All variants of one layer."""
    specs = space.variants(LAYER)
    tokens = load_tokens(run, "scoring")[:SCORING_SEQUENCES]
    walk = ReplacementWalk(parent, tokens, recipe.scoring.batch_tokens, windows=windows_of(specs))
    walk.climb_to(LAYER)
    blocks = block_subblocks(run, parent, LAYER, [(spec,) for spec in specs])
    return lambda: walk.try_variants(blocks)


def gkd(run: RunFolder, recipe: Recipe, compiled: bool) -> Callable[[], object]:
    """A step of the assembled child, with the recipe's settings."""
    settings = recipe.gkd.model_copy(update={"compile": compiled})
    parent, child = LiveParent(load_parent(recipe, run)), load_model(run / "child", machine_of(recipe))
    training = Training(recipe.model_copy(update={"gkd": settings}), run, parent, child)
    return lambda: training.step(0)


def _rates(name: str, done: Achieved) -> dict[str, float]:
    return {
        f"{name}_gflops_per_second": done.flops / done.seconds / 1e9,
        f"{name}_matmul_gflops_per_second": done.matmul_flops_per_second / 1e9,
    }


def figures() -> dict[str, float]:
    """Everything, printed and returned."""
    run = RunFolder(Path("runs/torch"))
    recipe = open_run(run)
    parent = load_parent(recipe, run)
    space = search_space_of(recipe, architecture_of(parent.config))
    result = dict(bld(run, parent, space, recipe))
    scored = achieved(scoring(run, parent, space, recipe))
    result |= {"scoring_fraction_of_floor": scored.fraction, **_rates("scoring", scored)}
    plain = gkd(run, recipe, compiled=False)
    distilled = achieved(plain)
    result |= {"gkd_fraction_of_matmul_rate": distilled.fraction, **_rates("gkd", distilled)}
    compiled = gkd(run, recipe, compiled=True)
    begin = time.perf_counter()
    compiled()
    result["gkd_seconds_to_compile"] = time.perf_counter() - begin
    seconds = median_seconds({"plain": plain, "compiled": compiled})
    result["gkd_speedup_compiled"] = seconds["plain"] / seconds["compiled"]
    for name, value in result.items():
        print(f"  {name:75s} {value:12.3f}")
    return result
