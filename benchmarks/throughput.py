"""FLOP/s of BLD, scoring and GKD over the machine's rate for the same products.

BLD: all trained variants of one layer, one step each, with their share of computing the parent's activations. Scoring:
all variants of one layer, on what prefix reuse leaves. GKD: a step of the quickstart's assembled child. Each beside the
first version of this code, in turns. The FLOPs are those of the products that the present code does.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from achieved import achieved, median_seconds
from bld_alternatives import alternatives
from first_version import FirstVersion
from torch import nn

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, machine_of
from puzzle_nas.library import block_layers, read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of
from puzzle_nas.stages.distill_child import Training
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Trainee
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.replacement import ReplacementWalk

LAYER = 14
BATCH_TOKENS = (512, 2048)
"""The quickstart's, and the default."""
TRAIN_SEQUENCES, SCORING_SEQUENCES = 80, 4
STEPS_A_TURN = 8
"""Of BLD: its weights and moments then stay in cache, as they do in a run."""
STEPS = 1000
"""Where schedules end; no more than a few are taken."""


def bld(first: FirstVersion, run: RunFolder, parent: nn.Module, space, recipe) -> dict[str, float]:
    """Both versions at both batch sizes."""
    layer = parent.get_submodule(f"model.layers.{LAYER}")
    tokens = load_tokens(run, "train")[:TRAIN_SEQUENCES]
    activations = LayerActivations(parent, tokens, run.scratch("benchmark"))
    activations.climb_to(LAYER)
    task = BlockTask(activations, layer, "token", parent.dtype == torch.bfloat16)
    x = activations.x.tensor.clone()
    compute = achieved(lambda: (activations.compute(LAYER), activations.advance()))
    activations.x.tensor.copy_(x)
    activations.compute(LAYER)
    specs = [s for options in space.options[LAYER].values() for s in options]
    starts = {s: read_variant(run.initial_variant(LAYER, s.id), "build-library") for s in specs if trained(run, s)}
    figures: dict[str, float] = {}
    for size in BATCH_TOKENS:
        count = size // tokens.shape[1]
        trainees = [
            Trainee(Job((spec,), Path(), dict, {}), start, parent, layer, recipe.bld, STEPS)
            for spec, start in starts.items()
        ]
        turns = itertools.cycle(torch.arange(len(tokens)).split(count))

        def step(trainees=trainees, turns=turns) -> None:
            batch = task.fetch(next(turns))
            for trainee in trainees:
                task.update(trainee, batch, trainee.optimiser.rate_at(0))

        def turn(step=step) -> None:
            for _ in range(STEPS_A_TURN):
                step()

        share = size / tokens.numel()
        now = achieved(step)
        seconds = median_seconds({"now": turn, "first": lambda count=count: first.does("bld", count, STEPS_A_TURN)})
        seconds = {version: taken / STEPS_A_TURN for version, taken in seconds.items()}
        flops = now.flops + share * compute.flops
        ideal = now.flops / now.matmul_flops_per_second + share * compute.flops / compute.matmul_flops_per_second
        name = f"_{size}_tokens_a_step"
        for version, taken in seconds.items():
            whole = taken + share * compute.seconds
            suffix = ("" if version == "now" else "_first_version") + name
            figures["bld_fraction_of_matmul_rate" + suffix] = ideal / whole
            figures["bld_gflops_per_second" + suffix] = flops / whole / 1e9
            figures["bld_tokens_per_second" + suffix] = size * len(starts) / whole
        figures["bld_matmul_gflops_per_second" + name] = flops / ideal / 1e9
        figures["speedup_bld_over_first_version" + name] = (seconds["first"] + share * compute.seconds) / (
            seconds["now"] + share * compute.seconds
        )
    figures["bld_held_out_loss_over_first_version"] = _quality(first, task, starts, parent, recipe.bld, len(tokens))
    figures |= alternatives(task, starts, parent, recipe.bld, torch.arange(BATCH_TOKENS[0] // tokens.shape[1]))
    activations.delete()
    default = f"_{max(BATCH_TOKENS)}_tokens_a_step"
    for key in ("bld_fraction_of_matmul_rate", "speedup_bld_over_first_version"):
        figures[key] = figures[key + default]
    return figures


def _quality(first: FirstVersion, task: BlockTask, starts, parent, settings, num_sequences: int) -> float:
    """Held-out loss after training on the same 16,384 tokens, over that of the first version: geometric mean."""
    held, batches = torch.arange(64, num_sequences), torch.randperm(64, generator=torch.manual_seed(0)).split(2)
    before = first.does("train", [batch.tolist() for batch in batches], held.tolist())
    ratios = []
    for spec, start in starts.items():
        now = Trainee(Job((spec,), Path(), dict, {}), start, parent, task.parent_layer, settings, len(batches))
        for number, sequences in enumerate(batches):
            task.update(now, task.fetch(sequences), now.optimiser.rate_at(number))
        with torch.no_grad():
            loss = task.loss(now, task.fetch(held)).item()
        ratios.append(loss / before[spec.id])
        print(f"  {spec.id:18s} held-out loss {loss:.5f}, first version {before[spec.id]:.5f}", flush=True)
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def trained(run: RunFolder, spec) -> bool:
    """Whether a spec of the layer is a variant with weights."""
    path = run.initial_variant(LAYER, spec.id)
    return path.exists() and bool(read_variant(path, "build-library"))


def scoring(run: RunFolder, parent: nn.Module, space, recipe, sequences: int) -> Callable[[], object]:
    """All variants of one layer."""
    walk = ReplacementWalk(parent, load_tokens(run, "scoring")[:sequences], recipe.scoring.batch_tokens)
    for _ in range(LAYER):
        walk.advance()
    specs = [s for options in space.options[LAYER].values() for s in options]
    choices = [(s,) for s in specs if run.initial_variant(LAYER, s.id).exists()]
    blocks = block_layers(run, parent, LAYER, choices)
    return lambda: walk.try_variants(blocks)


def gkd(run: RunFolder, parent: nn.Module, recipe, checkpoint: Path) -> Callable[[], object]:
    """Steps of a child, with the recipe's settings."""
    training = Training(recipe, run, LiveParent(parent), load_model(checkpoint, machine_of(recipe)))
    return lambda: training.step(0)


def figures() -> dict[str, float]:
    """Everything, printed and returned."""
    run = RunFolder(Path("runs/quickstart"))
    recipe = open_run(run)
    parent, shape = load_parent(run)
    threads = recipe.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    first = FirstVersion(
        run=str(run),
        layer=LAYER,
        threads=threads,
        train=TRAIN_SEQUENCES,
        scoring=SCORING_SEQUENCES,
        gkd=recipe.gkd.batch_tokens // recipe.data.sequence_length,
        settings={"bld": recipe.bld.model_dump(), "gkd": recipe.gkd.model_dump()},
    )
    space = search_space_of(recipe, shape)
    result = bld(first, run, parent, space, recipe)
    for name, work in (
        ("scoring", scoring(run, parent, space, recipe, SCORING_SEQUENCES)),
        ("gkd", gkd(run, parent, recipe, run / "child")),
    ):
        done = achieved(work, repeats=1)
        seconds = median_seconds({"now": work, "first": lambda name=name: first.does(name)})
        key = "scoring_fraction_of_floor" if name == "scoring" else "gkd_fraction_of_matmul_rate"
        for version, taken in seconds.items():
            suffix = "" if version == "now" else "_first_version"
            result[key + suffix] = done.flops / done.matmul_flops_per_second / taken
            result[f"{name}_gflops_per_second{suffix}"] = done.flops / taken / 1e9
        result[f"{name}_matmul_gflops_per_second"] = done.matmul_flops_per_second / 1e9
        result[f"speedup_{name}_over_first_version"] = seconds["first"] / seconds["now"]
    first.end()
    settings = recipe.gkd.model_copy(update={"compile": True})
    compiled = gkd(run, load_parent(run)[0], recipe.model_copy(update={"gkd": settings}), run / "child")
    begin = time.perf_counter()
    compiled()
    result["gkd_seconds_to_compile"] = time.perf_counter() - begin
    seconds = median_seconds({"now": work, "compiled": compiled})
    result["gkd_speedup_compiled"] = seconds["now"] / seconds["compiled"]
    for name, value in result.items():
        print(f"  {name:75s} {value:12.3f}")
    return result
