"""What settings of BLD lower replace-1-block KL most for the same tokens; the quickstart's variants of some layers.

From least squares, as runs/quickstart has them in library/initial; AdamW at 1e-3, batches of 512 and 8,192 tokens
where a name says nothing else. KL on the first KL_TOKENS of the selection split, as settings are chosen there; the loss
is that of the last HELD_OUT training sequences, over its value before.
python benchmarks/bld.py [NAME...]
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from elastic import visited
from results import save

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import load_parent, machine_of
from puzzle_nas.library import read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import BLDSettings, search_space_of
from puzzle_nas.subblocks import subblock_layer
from puzzle_nas.training.block_steps import BlockTask, Job, Trainee
from puzzle_nas.training.replacement import ReplacementWalk

LAYERS = (14, 22)
HELD_OUT, KL_TOKENS = 8, 1_024
"""Sequences, tokens."""
PLAIN = {"learning_rate": 1e-3, "batch_tokens": 512, "tokens": 8_192}
VARIANTS = {
    "untrained": {"tokens": 0},
    "1e-4": {"learning_rate": 1e-4},
    "3e-4": {"learning_rate": 3e-4},
    "1e-3": {},
    "3e-3": {"learning_rate": 3e-3},
    "1e-3_batch_256": {"batch_tokens": 256},
    "1e-3_batch_2048": {"batch_tokens": 2048},
    "1e-3_constant_rate": {"final_learning_rate_fraction": 1.0},
    "1e-3_by_batch": {"normalise": "batch"},
    "16384_tokens": {"tokens": 16_384},
    "32768_tokens": {"tokens": 32_768},
}


def trained(trainees: list[Trainee], task: BlockTask, batches) -> None:
    """All steps of all variants."""
    for number, sequences in enumerate(batches):
        batch = task.fetch(sequences)
        for trainee in trainees:
            task.update(trainee, batch, trainee.optimiser.rate_at(number))


@torch.no_grad()
def losses(trainees: list[Trainee], task: BlockTask, held: torch.Tensor) -> list[float]:
    """Of every variant on held-out sequences."""
    batch = task.fetch(held)
    return [task.loss(trainee, batch).item() for trainee in trainees]


def main() -> None:
    """Print a row for each setting, and keep the figures."""
    run = RunFolder(Path("runs/quickstart"))
    recipe = open_run(run)
    machine_of(recipe)
    parent, shape = load_parent(run)
    space = search_space_of(recipe, shape)
    tokens = load_tokens(run, "train")
    length = tokens.shape[1]
    tokens = tokens[: max(v.get("tokens", 0) for v in VARIANTS.values()) // length + HELD_OUT]
    held = torch.arange(len(tokens) - HELD_OUT, len(tokens))
    selection = load_tokens(run, "selection")[: KL_TOKENS // length]
    walk = ReplacementWalk(parent, selection, recipe.scoring.batch_tokens)
    names = sys.argv[1:] or list(VARIANTS)
    kl, ratios, seconds = defaultdict(list), defaultdict(list), defaultdict(float)
    for index, activations in visited(LAYERS, parent, tokens, run.scratch("benchmark"), walk):
        layer = parent.model.layers[index]
        starts = {
            spec: read_variant(run.initial_variant(index, spec.id), "build-library")
            for options in space.options[index].values()
            for spec in options
            if not spec.empty and run.initial_variant(index, spec.id).exists()
        }
        for name in names:
            settings = BLDSettings(**PLAIN | VARIANTS[name])
            task = BlockTask(activations, layer, settings.normalise, parent.dtype == torch.bfloat16)
            order = block_order(len(tokens) - HELD_OUT, settings.tokens // length, index)
            batches = order.split(settings.batch_tokens // length) if len(order) else ()
            trainees = [
                Trainee(Job((spec,), Path(), dict, {}), start, parent, layer, settings, max(1, len(batches)))
                for spec, start in starts.items()
            ]
            # Losses are compared under one normalisation.
            judge = BlockTask(activations, layer, "token", parent.dtype == torch.bfloat16)
            before, begin = losses(trainees, judge, held), time.perf_counter()
            trained(trainees, task, batches)
            seconds[name] += time.perf_counter() - begin
            ratios[name] += [after / start for after, start in zip(losses(trainees, judge, held), before, strict=True)]
            blocks = [
                {spec.slot: subblock_layer(parent.config, layer.layer_type, spec, trainee.weights(parent.dtype))}
                for spec, trainee in zip(starts, trainees, strict=True)
            ]
            scores = [float(result.kl_nats.mean()) for result in walk.try_variants(blocks)]
            kl[name] += scores
            row = "".join(f"  {spec.id} {score:.4f}" for spec, score in zip(starts, scores, strict=True))
            print(f"layer {index:2d} {name:20s}{row}", flush=True)
    figures: dict[str, float] = {"tokens": PLAIN["tokens"], "kl_tokens": KL_TOKENS}
    print(f"\n{'':20s}{'mean KL, nats':>15s}{'loss over start':>17s}{'seconds':>9s}")
    for name in names:
        loss = math.exp(statistics.mean(map(math.log, ratios[name])))
        figures |= {f"mean_kl_nats.{name}": statistics.mean(kl[name]), f"held_out_loss_over_start.{name}": loss}
        figures[f"seconds.{name}"] = seconds[name]
        print(f"{name:20s}{statistics.mean(kl[name]):15.5f}{loss:17.4f}{seconds[name]:9.1f}")
    print("Written to", save("bld", figures))


if __name__ == "__main__":
    main()
