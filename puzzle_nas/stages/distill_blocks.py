"""Blockwise local distillation, decoupled (Puzzle, section 2).

Layer by layer: the parent's activations of layer i lie in memory-mapped files, all variants of layer i train on
them, then layer i + 1. Each parent layer sees each token once; a layer that is done is done for good. Where the disk
does not hold the activations of all tokens, they come in shards, and every variant waits on disk for its next one.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import safetensors.torch
import torch

from puzzle_nas.architecture import Spec
from puzzle_nas.artifacts import RunFolder, read_json, write_bytes
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import (
    facts_path,
    read_variant,
    variant_is_stored,
    write_variant,
)
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.subblocks import subblock_layer
from puzzle_nas.training import parallel
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.losses import block_loss
from puzzle_nas.training.optimiser import Optimiser

NAME = "distill_blocks"
COMMAND = "distill-blocks"
NEEDS = ("build_library",)
SETTINGS = ("seed", "bld")
OUTPUTS = ("library/main/*/*",)

CURVE_POINTS = 40
TRAINING_BYTES_PER_PARAMETER = 24
"""Master weight, gradient, two moments, a bfloat16 copy, and slack."""


class Trainee:
    """One variant in training: its sub-block in float32, its optimiser, its losses."""

    def __init__(self, spec: Spec, block: PuzzleDecoderLayer, recipe: Recipe, total_steps: int):
        self.spec, self.block = spec, block
        self.optimiser = Optimiser(block.requires_grad_(True), recipe.bld, total_steps)
        self.losses: list[float] = []


@dataclass(frozen=True)
class Shard:
    """Training sequences whose activations are on disk at once, and the steps taken on them."""

    begin: int
    end: int
    wanted: int
    """Sequences trained on; more than there are means that they are gone through again."""
    batch_sequences: int
    first_step: int

    @property
    def end_step(self) -> int:
        """The step after the last one."""
        return self.first_step + math.ceil(self.wanted / self.batch_sequences)

    def batches(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Which sequences of the shard come in which step."""
        return block_order(self.end - self.begin, self.wanted, seed).split(self.batch_sequences)


def shards_of(trained: int, wanted: int, batch_sequences: int, most: int | None) -> list[Shard]:
    """`trained` sequences in shards of at most `most` (None: one shard); `wanted` are divided among them alike."""
    shards: list[Shard] = []
    count = math.ceil(trained / (most or trained))
    for number in range(count):
        begin, end = trained * number // count, trained * (number + 1) // count
        share = wanted * (number + 1) // count - wanted * number // count
        shards.append(Shard(begin, end, share, batch_sequences, shards[-1].end_step if shards else 0))
    return shards


class BlockTask:
    """One layer's training data and loss."""

    def __init__(self, activations: LayerActivations, parent_layer: PuzzleDecoderLayer, normalise: str, autocast: bool):
        self.activations, self.parent_layer, self.normalise = activations, parent_layer, normalise
        self.device = activations.parent.device
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast)

    def fetch(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, attention and ffn of some sequences, each [B, T, D]."""
        files = (self.activations.x, self.activations.attention, self.activations.ffn)
        x, attention, ffn = (file.tensor[sequences].to(self.device) for file in files)
        return x, attention, ffn

    def loss(self, trainee: Trainee, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Normalised error of the whole block's output with the other sub-block the parent's, frozen."""
        x, attention, ffn = batch
        inputs = self.activations.inputs
        with self.autocast:
            if trainee.spec.slot == "ffn":
                middle = x + attention
                error = trainee.block.mlp(trainee.block.post_attention_layernorm(middle)).float() - ffn
            else:
                masks = {**inputs, "attention_mask": inputs["attention_mask"].get(trainee.block.layer_type)}
                child = trainee.block.self_attn(trainee.block.input_layernorm(x), **masks)[0]
                parent_ffn = self.parent_layer.mlp(self.parent_layer.post_attention_layernorm(x + child))
                error = (child.float() - attention) + (parent_ffn.float() - ffn)
        output = x.float() + attention + ffn
        return block_loss(error.flatten(0, 1), output.flatten(0, 1), self.normalise)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Train every variant that has weights; copy those that have none."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.divide_threads()
    space = search_space_of(recipe, shape)
    all_tokens = load_tokens(run, "train")
    length = all_tokens.shape[1]
    batch_sequences = max(1, recipe.bld.batch_tokens // length)
    held_out = min(batch_sequences, max(1, len(all_tokens) // 4))
    wanted = math.ceil(recipe.bld.tokens / length)
    tokens = all_tokens[: min(len(all_tokens), wanted + held_out)]
    trained_sequences = len(tokens) - held_out
    specs_of = [
        [spec for slot, options in slots.items() for spec in options if spec != shape.parent_spec(slot)]
        for slots in space.options
    ]
    layers = parallel.share(
        [i for i, specs in enumerate(specs_of) if not all(_is_done(run, i, spec) for spec in specs)]
    )
    if recipe.bld.tokens == 0:
        _copy_initial(run, specs_of, layers)
        return
    most = recipe.bld.shard_tokens and max(batch_sequences, recipe.bld.shard_tokens // length)
    shards = shards_of(trained_sequences, wanted, batch_sequences, most)
    total_steps = shards[-1].end_step
    waiting = [(i, spec) for i in layers for spec in specs_of[i] if _in_training(run, i, spec)]
    reached = min((_saved_step(_checkpoint_path(run, i, spec)) for i, spec in waiting), default=0)
    shards = [shard for shard in shards if shard.end_step > reached]
    held = torch.arange(trained_sequences, len(tokens))
    problems: list[str] = []
    with progress("distil blocks, layer", len(layers) * len(shards)) as ticker:
        for shard, index, activations in _activations(run, parent, tokens, held, shards, layers):
            layer = parent.model.layers[index]
            task = BlockTask(activations, layer, recipe.bld.normalise, parent.dtype == torch.bfloat16)
            pending = []
            for spec in specs_of[index]:
                if _in_training(run, index, spec):
                    pending.append(spec)
                elif not _is_done(run, index, spec):
                    write_variant(run.variant(index, spec.id), spec, {}, {"tokens": 0})
            for group in _groups(run, index, pending, recipe.memory == "stream"):
                trainees = [
                    Trainee(
                        spec,
                        subblock_layer(
                            parent.config, layer.layer_type, spec, _initial_float32(run, index, spec, parent)
                        ),
                        recipe,
                        total_steps,
                    )
                    for spec in group
                ]
                held_here = held - trained_sequences + (shard.end - shard.begin)
                starts = _evaluate(task, trainees, held_here)
                _train(run, recipe, task, trainees, shard, total_steps, index)
                if shard.end_step < total_steps:
                    continue
                ends = _evaluate(task, trainees, held_here)
                for trainee, start, end in zip(trainees, starts, ends, strict=True):
                    problem = _keep(run, recipe, index, trainee, start, end, parent.dtype)
                    problems += [problem] if problem else []
                    _checkpoint_path(run, index, trainee.spec).unlink(missing_ok=True)
            ticker.advance()
    for problem in parallel.gathered(problems):
        console.print(f"  {problem}")


def _activations(
    run: RunFolder, parent, tokens: torch.Tensor, held: torch.Tensor, shards: Sequence[Shard], layers: Sequence[int]
) -> Iterator[tuple[Shard, int, LayerActivations]]:
    """Each shard at each layer; held-out sequences follow the shard's own."""
    for shard in shards:
        sequences = torch.cat([torch.arange(shard.begin, shard.end), held])
        activations = LayerActivations(parent, tokens[sequences], run.scratch(NAME) / f"rank_{parallel.rank()}")
        for index in layers:
            activations.climb_to(index)
            yield shard, index, activations
        activations.delete()


def _is_done(run: RunFolder, layer: int, spec: Spec) -> bool:
    return variant_is_stored(run.variant(layer, spec.id))


def _in_training(run: RunFolder, layer: int, spec: Spec) -> bool:
    """Whether a variant has weights, and training still before it."""
    return (
        not _is_done(run, layer, spec) and read_json(facts_path(run.initial_variant(layer, spec.id)))["parameters"] > 0
    )


def _copy_initial(run: RunFolder, specs_of: Sequence[Sequence[Spec]], layers: Sequence[int]) -> None:
    for index in layers:
        for spec in specs_of[index]:
            initial = run.initial_variant(index, spec.id)
            write_variant(run.variant(index, spec.id), spec, read_variant(initial, "build-library"), {"tokens": 0})


def _initial_float32(run: RunFolder, layer: int, spec: Spec, parent) -> dict[str, torch.Tensor]:
    weights = read_variant(run.initial_variant(layer, spec.id), "build-library")
    return {name: w.to(device=parent.device, dtype=torch.float32, copy=True) for name, w in weights.items()}


def _groups(run: RunFolder, layer: int, specs: Sequence[Spec], one_by_one: bool) -> list[list[Spec]]:
    """Variants that train together: as many as fit in half of this rank's part of the free memory."""
    if one_by_one:
        return [[spec] for spec in specs]
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    free /= parallel.ranks_here()
    groups: list[list[Spec]] = []
    room = 0.0
    for spec in specs:
        parameters = read_json(facts_path(run.initial_variant(layer, spec.id)))["parameters"]
        need = TRAINING_BYTES_PER_PARAMETER * parameters
        if not groups or need > room:
            groups.append([])
            room = free / 2
        groups[-1].append(spec)
        room -= need
    return groups


def _checkpoint_path(run: RunFolder, layer: int, spec: Spec) -> Path:
    return run.scratch(NAME) / f"layer_{layer:02d}.{spec.id}.safetensors"


def _train(
    run: RunFolder, recipe: Recipe, task: BlockTask, trainees: Sequence[Trainee], shard: Shard, total: int, layer: int
) -> None:
    """All steps of a shard, from wherever the last run stopped."""
    batches = shard.batches(recipe.seed + layer + 1000 * shard.begin)
    begins = [_load_checkpoint(_checkpoint_path(run, layer, trainee.spec), trainee) for trainee in trainees]
    for step in range(max(shard.first_step, min(begins)), shard.end_step):
        batch = task.fetch(batches[step - shard.first_step])
        # One that was written just before a kill is ahead of the others.
        for trainee in [t for t, begin in zip(trainees, begins, strict=True) if begin <= step]:
            loss = task.loss(trainee, batch)
            loss.backward()
            trainee.optimiser.step(step)
            trainee.losses.append(loss.item())
            is_due = (step + 1) % recipe.bld.checkpoint_every_steps == 0 or step + 1 == shard.end_step
            if is_due and step + 1 < total:
                _save_checkpoint(_checkpoint_path(run, layer, trainee.spec), trainee, step + 1)


def _save_checkpoint(path: Path, trainee: Trainee, step: int) -> None:
    tensors = trainee.optimiser.state() | {"losses": torch.tensor(trainee.losses, dtype=torch.float64)}
    tensors = {name: w.cpu().contiguous().clone() for name, w in tensors.items()}
    write_bytes(path, safetensors.torch.save(tensors, {"step": str(step)}))


def _saved_step(path: Path) -> int:
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def _load_checkpoint(path: Path, trainee: Trainee) -> int:
    """The step to continue with."""
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    trainee.losses = tensors.pop("losses").tolist()
    trainee.optimiser.load(tensors)
    return step


@torch.no_grad()
def _evaluate(task: BlockTask, trainees: Sequence[Trainee], sequences: torch.Tensor) -> list[float]:
    batch = task.fetch(sequences)
    return [task.loss(trainee, batch).item() for trainee in trainees]


def _keep(run, recipe, layer: int, trainee: Trainee, start: float, end: float, dtype) -> str | None:
    """Write a variant; the sentence to print if training made it worse."""
    initial = run.initial_variant(layer, trainee.spec.id)
    facts = read_json(facts_path(initial))
    for name in ("spec", "parameters", "checksum"):
        facts.pop(name)
    fell_back = not (math.isfinite(end) and end <= start)
    stride = max(1, math.ceil(len(trainee.losses) / CURVE_POINTS))
    curve = [
        sum(trainee.losses[i : i + stride]) / len(trainee.losses[i : i + stride])
        for i in range(0, len(trainee.losses), stride)
    ]
    facts |= {
        "tokens": recipe.bld.tokens,
        "held_out_loss_start": start if math.isfinite(start) else None,
        "held_out_loss_end": end if math.isfinite(end) else None,
        "fell_back": fell_back,
        "loss_curve": [value if math.isfinite(value) else None for value in curve],
    }
    if fell_back:
        weights = read_variant(initial, "build-library")
    else:
        weights = {name: w.to(dtype) for name, w in trainee.optimiser.parameters.items()}
    write_variant(run.variant(layer, trainee.spec.id), trainee.spec, weights, facts)
    if not fell_back:
        return None
    how = f"rose from {start:.4g} to {end:.4g}" if math.isfinite(end) else "became NaN"
    return f"Layer {layer}, {trainee.spec.id}: the loss {how} in BLD; its initialisation is kept."
