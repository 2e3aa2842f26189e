"""FLOP/s of BLD, scoring and GKD over the machine's rate for the same products.

BLD: all trained variants of one layer, one step each, with their share of computing the parent's activations, beside
the first version of this code in the same run. Scoring: all variants of one layer, on what prefix reuse leaves.
GKD: a step of the quickstart's assembled child. The FLOPs are those of the products that the present code does.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from achieved import Achieved, achieved, median_seconds
from bld_alternatives import alternatives
from torch import nn

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, machine_of
from puzzle_nas.library import block_layers, read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of
from puzzle_nas.stages.distill_child import gkd_loss
from puzzle_nas.subblocks import subblock_layer
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_distillation import BlockTask, Job, Trainee
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.replacement import ReplacementWalk

LAYER = 14
BATCH_TOKENS = (512, 2048)
"""The quickstart's, and the default."""
STEPS = 1000
"""Where schedules end; no more than a few are taken."""


class FirstVersion:
    """A variant's step as the first version of BLD took it: its own norm, trained; a loss of separate operations."""

    def __init__(self, spec, weights, parent, layer, settings, steps):
        master = {name: w.float() for name, w in weights.items()}
        self.spec, self.parent_layer = spec, layer
        self.block = subblock_layer(parent.config, layer.layer_type, spec, master).requires_grad_(True)
        self.optimiser = Optimiser(self.block, settings, steps)

    def loss(self, task: BlockTask, sequences: torch.Tensor) -> torch.Tensor:
        """Each token's error over its own energy."""
        files = task.activations
        x, attention, ffn = (f.tensor[sequences] for f in (files.x, files.attention, files.ffn))
        with task.autocast:
            if self.spec.slot == "ffn":
                error = self.block.mlp(self.block.post_attention_layernorm(x + attention)).float() - ffn
            else:
                child = self.block.self_attn(self.block.input_layernorm(x), **task.inputs)[0]
                middle = self.parent_layer.post_attention_layernorm(x + child)
                error = (child.float() - attention) + (self.parent_layer.mlp(middle).float() - ffn)
        squares, energy = error.square().sum(-1), (x.float() + attention + ffn).square().sum(-1)
        return (squares / energy.clamp_min(1e-12)).mean()


def bld(run: RunFolder, parent: nn.Module, space, recipe) -> dict[str, float]:
    """Both versions at both batch sizes."""
    layer = parent.model.layers[LAYER]
    tokens = load_tokens(run, "train")[:80]
    activations = LayerActivations(parent, tokens, run.scratch("benchmark"))
    activations.climb_to(LAYER)
    task = BlockTask(activations, layer, "token", parent.dtype == torch.bfloat16)
    x = activations.x.tensor.clone()
    compute = achieved(lambda: (activations.compute(LAYER), activations.advance()))
    activations.x.tensor.copy_(x)
    activations.compute(LAYER)
    specs = [s for options in space.options[LAYER].values() for s in options]
    starts = {s: read_variant(run.initial_variant(LAYER, s.id), "build-library") for s in specs if _trained(run, s)}
    figures: dict[str, float] = {}
    for size in BATCH_TOKENS:
        count = size // tokens.shape[1]
        trainees = [
            Trainee(Job((spec,), Path(), dict, {}), start, parent, layer, recipe.bld, STEPS)
            for spec, start in starts.items()
        ]
        first = [FirstVersion(spec, start, parent, layer, recipe.bld, STEPS) for spec, start in starts.items()]
        turns = itertools.cycle(torch.arange(len(tokens)).split(count))

        def step(trainees=trainees, turns=turns) -> None:
            batch = task.fetch(next(turns))
            for trainee in trainees:
                task.loss(trainee, batch).backward()
                trainee.optimiser.step(0)

        def first_step(first=first, turns=turns) -> None:
            sequences = next(turns)
            for trainee in first:
                trainee.loss(task, sequences).backward()
                trainee.optimiser.step(0)

        share = size / tokens.numel()
        now = achieved(step)
        seconds = median_seconds({"now": step, "first": first_step})
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
    figures["bld_held_out_loss_over_first_version"] = _quality(task, starts, parent, recipe.bld, len(tokens))
    figures |= alternatives(task, starts, parent, recipe.bld, torch.arange(BATCH_TOKENS[0] // tokens.shape[1]))
    activations.delete()
    default = f"_{max(BATCH_TOKENS)}_tokens_a_step"
    for key in ("bld_fraction_of_matmul_rate", "speedup_bld_over_first_version"):
        figures[key] = figures[key + default]
    return figures


def _quality(task: BlockTask, starts, parent, settings, num_sequences: int) -> float:
    """Held-out loss after training on the same 16,384 tokens, over that of the first version: geometric mean."""
    held, batches = torch.arange(64, num_sequences), torch.randperm(64, generator=torch.manual_seed(0)).split(2)
    ratios = []
    for spec, start in starts.items():
        now = Trainee(Job((spec,), Path(), dict, {}), start, parent, task.parent_layer, settings, len(batches))
        first = FirstVersion(spec, start, parent, task.parent_layer, settings, len(batches))
        for number, sequences in enumerate(batches):
            task.loss(now, task.fetch(sequences)).backward()
            now.optimiser.step(number)
            first.loss(task, sequences).backward()
            first.optimiser.step(number)
        with torch.no_grad():
            losses = [task.loss(now, task.fetch(held)).item(), first.loss(task, held).item()]
        ratios.append(losses[0] / losses[1])
        print(f"  {spec.id:18s} held-out loss {losses[0]:.5f}, first version {losses[1]:.5f}", flush=True)
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _trained(run: RunFolder, spec) -> bool:
    path = run.initial_variant(LAYER, spec.id)
    return path.exists() and bool(read_variant(path, "build-library"))


def scoring(run: RunFolder, parent: nn.Module, space, recipe) -> Achieved:
    """All variants of one layer."""
    walk = ReplacementWalk(parent, load_tokens(run, "scoring")[:4], recipe.scoring.batch_tokens)
    for _ in range(LAYER):
        walk.advance()
    choices = [(s,) for options in space.options[LAYER].values() for s in options]
    blocks = block_layers(run, parent, LAYER, choices)
    return achieved(lambda: walk.try_variants(blocks), 3)


def gkd(run: RunFolder, parent: nn.Module, recipe) -> Achieved:
    """Steps of the quickstart's settings."""
    child = load_model(run / "child", machine_of(recipe)).float()
    child.model.layers.requires_grad_(True)
    child.train()
    optimiser = Optimiser(child.model.layers, recipe.gkd, STEPS)
    tokens = load_tokens(run, "train")[: recipe.gkd.batch_tokens // 256]
    outputs, blocks = LiveParent(parent), torch.arange(len(tokens))

    def step() -> None:
        gkd_loss(outputs, child, tokens, blocks, recipe.gkd).backward()
        optimiser.step(0)

    return achieved(step, 5)


def figures() -> dict[str, float]:
    """Everything, printed and returned."""
    run = RunFolder(Path("runs/quickstart"))
    recipe = open_run(run)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    parent, shape = load_parent(run)
    space = search_space_of(recipe, shape)
    result = bld(run, parent, space, recipe)
    for name, done in (("scoring", scoring(run, parent, space, recipe)), ("gkd", gkd(run, parent, recipe))):
        key = "scoring_fraction_of_floor" if name == "scoring" else "gkd_fraction_of_matmul_rate"
        result[key] = done.fraction
        result[f"{name}_gflops_per_second"] = done.flops / done.seconds / 1e9
        result[f"{name}_matmul_gflops_per_second"] = done.matmul_flops_per_second / 1e9
    for name, value in result.items():
        print(f"  {name:75s} {value:12.3f}")
    return result
