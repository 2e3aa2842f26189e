"""Elastic widths: all FFN widths of a layer as prefixes of one sorted FFN, trained in one run, against one by one.

Channels are ranked once for all widths, so the gate and up projections of a width start as a prefix of the widest
one's; the down projections are solved for each width. Hence two elastic ways: everything shared, from the widest's
start, and gate and up shared with a down projection for each width, which starts where separate training does.
Same tokens for every width, same optimiser; the mean replace-1-block KL on the selection split, and the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from puzzle_nas.architecture import GatedFFN
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import read_variant
from puzzle_nas.pipeline import open_run
from puzzle_nas.subblocks import Weights, subblock_layer
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Trainee
from puzzle_nas.training.losses import block_loss
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.replacement import ReplacementWalk

LAYERS = (2, 14, 22)
TOKENS = 32768
WAYS = ("initial", "separate", "elastic_shared_down", "elastic_own_down")
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


class Elastic(nn.Module):
    """One sorted FFN, of which every width is a prefix. Weights as of gate [F, D], up [F, D], down [D, F]."""

    def __init__(self, starts: dict[int, Weights], own_down: bool):
        super().__init__()
        widest = starts[max(starts)]
        for width, start in starts.items():
            assert torch.equal(start[GATE], widest[GATE][:width]), "widths are not prefixes of each other"
        self.gate, self.up = (nn.Parameter(widest[name].float()) for name in (GATE, UP))
        downs = {w: starts[w][DOWN].float() for w in starts} if own_down else {max(starts): widest[DOWN].float()}
        self.downs = nn.ParameterDict({str(width): nn.Parameter(down) for width, down in downs.items()})

    def down(self, width: int) -> torch.Tensor:
        """The down projection of one width."""
        return self.downs[str(width)] if str(width) in self.downs else next(iter(self.downs.values()))[:, :width]

    def forward(self, x_BTD: torch.Tensor, widths) -> list[torch.Tensor]:
        """The output of every width; the channels are computed once."""
        gate, up = nn.functional.linear(x_BTD, self.gate), nn.functional.linear(x_BTD, self.up)
        channels = nn.functional.silu(gate) * up
        return [nn.functional.linear(channels[..., :width], self.down(width)) for width in widths]

    def weights(self, width: int, start: Weights) -> Weights:
        """One width, as in the library."""
        trained = {GATE: self.gate[:width], UP: self.up[:width], DOWN: self.down(width)}
        return {name: trained.get(name, w).detach().to(w.dtype).contiguous() for name, w in start.items()}


def visited(
    layers: Sequence[int], parent: nn.Module, tokens: torch.Tensor, folder: Path, walk: ReplacementWalk
) -> Iterator[tuple[int, LayerActivations]]:
    """Each of some layers with the parent's activations there; `walk` stands at the same one."""
    activations = LayerActivations(parent, tokens, folder)
    for index in range(max(layers) + 1):
        activations.climb_to(index)
        if index in layers:
            yield index, activations
        walk.advance()
    activations.delete()


def timed(batches, step: Callable[[int, torch.Tensor], None]) -> float:
    """Seconds of all steps."""
    begin = time.perf_counter()
    for number, sequences in enumerate(batches):
        step(number, sequences)
    return time.perf_counter() - begin


def train(way: str, task: BlockTask, starts: dict[int, Weights], parent, settings, batches):
    """(weights of every width, seconds)."""
    if way == "initial":
        return starts, 0.0
    if way == "separate":
        trainees = {
            width: Trainee(
                Job((GatedFFN(width),), Path(), dict, {}), w, parent, task.parent_layer, settings, len(batches)
            )
            for width, w in starts.items()
        }

        def step(number, sequences):
            batch = task.fetch(sequences)
            for trainee in trainees.values():
                task.update(trainee, batch, trainee.optimiser.rate_at(number))

        seconds = timed(batches, step)
        return {width: t.weights(parent.dtype) for width, t in trainees.items()}, seconds
    elastic = Elastic(starts, own_down=way == "elastic_own_down")
    optimiser = Optimiser(elastic, settings, len(batches))

    def elastic_step(number, sequences):
        batch = task.fetch(sequences)
        with task.autocast:
            outputs = elastic(batch.ffn_in, starts)
        sum(block_loss(batch.weight, [output], [batch.ffn]) for output in outputs).backward()
        optimiser.step(number)

    seconds = timed(batches, elastic_step)
    return {width: elastic.weights(width, start) for width, start in starts.items()}, seconds


def figures() -> dict[str, float]:
    """Mean KL and time of every way, printed and returned."""
    run = RunFolder(Path("runs/quickstart"))
    recipe = open_run(run)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    parent, shape = load_parent(run)
    widths = [round(f * shape.intermediate_size) for f in recipe.search_space.width_fractions]
    tokens = load_tokens(run, "train")
    wanted = TOKENS // tokens.shape[1]
    tokens = tokens[:wanted]
    walk = ReplacementWalk(parent, load_tokens(run, "selection"), recipe.scoring.batch_tokens)
    kl: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for index, activations in visited(LAYERS, parent, tokens, run.scratch("benchmark"), walk):
        layer = parent.model.layers[index]
        task = BlockTask(activations, layer, recipe.bld.normalise, parent.dtype == torch.bfloat16)
        starts = {w: read_variant(run.initial_variant(index, GatedFFN(w).id), "build-library") for w in widths}
        batches = block_order(len(tokens), wanted, index).split(recipe.bld.batch_tokens // tokens.shape[1])
        for way in WAYS:
            trained, taken = train(way, task, starts, parent, recipe.bld, batches)
            seconds[way] += taken
            blocks = [
                {"ffn": subblock_layer(parent.config, layer.layer_type, GatedFFN(width), weights)}
                for width, weights in trained.items()
            ]
            scores = [float(result.kl_nats.mean()) for result in walk.try_variants(blocks)]
            kl[way] += scores
            row = "".join(f"  w{w} {score:.4f}" for w, score in zip(trained, scores, strict=True))
            print(f"  layer {index:2d} {way:20s}{row}  {taken:6.1f} s", flush=True)
    mean = {way: statistics.mean(values) for way, values in kl.items()}
    result = {f"elastic_mean_kl_nats.{way}": value for way, value in mean.items()}
    for way in WAYS[2:]:
        result[f"{way}_kl_over_separate"] = mean[way] / mean["separate"]
        result[f"{way}_seconds_over_separate"] = seconds[way] / seconds["separate"]
    best = min(WAYS[2:], key=mean.__getitem__)
    result["elastic_kl_over_separate"] = mean[best] / mean["separate"]
    result["elastic_seconds_over_separate"] = seconds[best] / seconds["separate"]
    for name, value in result.items():
        print(f"  {name:45s} {value:.4f}")
    return result
