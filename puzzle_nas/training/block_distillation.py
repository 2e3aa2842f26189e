"""Blockwise local distillation, decoupled and coupled (Puzzle, section 2).

Layer by layer: the parent's activations of layer i lie in memory-mapped files, or in a GPU's memory, everything of
layer i trains on them, then layer i + 1. Each parent layer sees each token once; a layer that is done is done for good.
Where the disk does not hold the activations of all tokens, they come in shards, and every job waits on disk for its
next one.

Of several ranks, each trains contiguous layers. It first climbs through them without training, so that the next rank
has what its own first layer receives, and then begins again below them: two passes through the parent in all.

Shapes: S sequences, B of them in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.errors import ArtifactError
from puzzle_nas.library import variant_is_stored, write_variant
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import BLDSettings, Recipe
from puzzle_nas.subblocks import Weights, windows_of
from puzzle_nas.training import parallel
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Steps, Trainee
from puzzle_nas.training.checkpoints import read_checkpoint, write_checkpoint

MOST_SAID = 5
"""Variants with trouble that are named."""
CURVE_POINTS = 40
CHECKPOINT_STEPS = 200
"""Between checkpoints within a layer."""
TRAINING_BYTES_PER_PARAMETER = 24
"""Master weight, gradient, two moments, a bfloat16 copy, and slack."""


Order = Callable[[int, int, int], torch.Tensor]
"""`data.batches.block_order`."""


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

    def batches(self, order: Order, seed: int) -> tuple[torch.Tensor, ...]:
        """Which sequences of the shard come in which step."""
        return order(self.end - self.begin, self.wanted, seed + 1000 * self.begin).split(self.batch_sequences)


def shards_of(trained: int, wanted: int, batch_sequences: int, most: int | None) -> list[Shard]:
    """`trained` sequences in shards of at most `most` (None: one shard); `wanted` are divided among them alike."""
    shards: list[Shard] = []
    count = math.ceil(trained / (most or trained))
    for number in range(count):
        begin, end = trained * number // count, trained * (number + 1) // count
        share = wanted * (number + 1) // count - wanted * number // count
        shards.append(Shard(begin, end, share, batch_sequences, shards[-1].end_step if shards else 0))
    return shards


def distill_blocks(
    recipe: Recipe,
    tokens_each: int,
    run: RunFolder,
    stage: str,
    parent: PreTrainedModel,
    all_tokens_ST: torch.Tensor,
    jobs: Sequence[Sequence[Job]],
    order: Order,
) -> None:
    """Train every layer's jobs that are not stored yet, and store them; what has no weights is stored as it is.

    Args:
        tokens_each: on which each job trains.
        stage: whose scratch folder to use.
        jobs: one list for each layer.
    """
    settings, length = recipe.bld, all_tokens_ST.shape[1]
    batch_sequences = max(1, settings.batch_tokens // length)
    held_out = min(batch_sequences, max(1, len(all_tokens_ST) // 4))
    wanted = math.ceil(tokens_each / length)
    tokens = all_tokens_ST[: min(len(all_tokens_ST), wanted + held_out)]
    # Ranks that looked for themselves might see what another one has stored meanwhile, and divide otherwise.
    pending = parallel.from_first(
        lambda: {job.path for layer_jobs in jobs for job in layer_jobs if not variant_is_stored(job.path)}
    )
    folder = run.scratch(stage)
    training: dict[int, dict[Path, Job]] = {}
    for layer, layer_jobs in enumerate(jobs):
        for job in layer_jobs:
            if job.path not in pending:
                continue
            if not all(spec.empty for spec in job.specs):
                training.setdefault(layer, {})[folder / f"layer_{layer:02d}.{job.id}.safetensors"] = job
            elif parallel.is_first():
                write_variant(job.path, job.specs, {}, {"tokens": 0})
    ranges = parallel.parts(list(training), min(len(training), parallel.world_size()))
    mine = ranges[parallel.rank()] if parallel.rank() < len(ranges) else []
    most = settings.shard_tokens and max(batch_sequences, settings.shard_tokens // length)
    shards = shards_of(len(tokens) - held_out, wanted, batch_sequences, most)
    total_steps = shards[-1].end_step
    reached = min((_saved_step(path) for layer in mine for path in training[layer]), default=total_steps)
    # A rank that is further still passes on to the next one what that needs.
    reached = min(parallel.gathered([reached]))
    shards = [shard for shard in shards if shard.end_step > reached]
    problems: list[str] = []
    with progress("distil blocks, layer", len(mine) * len(shards)) as ticker:
        windows = windows_of(spec for layer_jobs in jobs for job in layer_jobs for spec in job.specs)
        for shard, layer, activations in _activations(parent, tokens, shards, ranges, folder, windows):
            task = BlockTask(activations, parent.dtype == torch.bfloat16)
            batches = shard.batches(order, recipe.seed + layer)
            held = torch.arange(shard.end - shard.begin, shard.end - shard.begin + held_out)
            for group in _groups(training[layer], task.device, one_by_one=recipe.memory != "all"):
                problems += _distil(task, layer, group, settings, tokens_each, shard, batches, held, total_steps)
            ticker.advance()
    # What is not a number says more than what rose.
    problems = sorted(parallel.gathered(problems), key=lambda problem: "the loss rose" in problem)
    for problem in problems[:MOST_SAID]:
        console.print(f"  {problem}")
    if more := len(problems[MOST_SAID:]):
        trained = sum(map(len, training.values()))
        console.print(
            f"  So it went with {more} more, of {trained} variants in all. A lower bld.learning_rate or more "
            "bld.tokens may help."
        )


def _activations(
    parent: PreTrainedModel,
    tokens: torch.Tensor,
    shards: Sequence[Shard],
    ranges: Sequence[Sequence[int]],
    folder: Path,
    windows: Sequence[int],
) -> Iterator[tuple[Shard, int, LayerActivations]]:
    """Each shard at each of this rank's layers. The held-out sequences, which are the last, follow the shard's own.

    Args:
        ranges: the layers of each rank that has any.
    """
    rank = parallel.rank()
    if rank >= len(ranges):
        return
    for shard in shards:
        here = torch.cat([tokens[shard.begin : shard.end], tokens[shards[-1].end :]])
        first = ranges[rank][0] if rank else 0
        activations = LayerActivations(parent, here, folder / f"rank_{rank}", windows, first)
        if rank + 1 < len(ranges):
            activations.pass_on(ranges[rank + 1][0])
        for layer in ranges[rank]:
            activations.climb_to(layer)
            yield shard, layer, activations
        activations.delete()


def _groups(
    jobs: Mapping[Path, Job], device: torch.device, one_by_one: bool
) -> Iterator[list[tuple[Path, Job, Weights]]]:
    """Jobs that train together, with their start: as many as fit in half of this process's part of the free memory."""
    most = 0.0 if one_by_one else parallel.share_of_memory(device) / 2
    group: list[tuple[Path, Job, Weights]] = []
    taken = 0.0
    for path, job in jobs.items():
        start = job.start()
        need = TRAINING_BYTES_PER_PARAMETER * sum(w.numel() for w in start.values())
        if group and taken + need > most:
            yield group
            group, taken = [], 0.0
        group.append((path, job, start))
        taken += need
    if group:
        yield group


def _distil(
    task: BlockTask,
    layer: int,
    group: Sequence[tuple[Path, Job, Weights]],
    settings: BLDSettings,
    tokens_each: int,
    shard: Shard,
    batches: Sequence[torch.Tensor],
    held: torch.Tensor,
    total_steps: int,
) -> list[str]:
    """Train a group on a shard and, after the last one, store it; sentences to print about those that had trouble."""
    parent = task.activations.parent
    trainees = [Trainee(job, start, parent, layer, settings, total_steps) for _, job, start in group]
    paths = [path for path, _, _ in group]
    is_last = shard.end_step == total_steps
    starts = _evaluate(task, trainees, held) if is_last else []
    _train(task, trainees, paths, shard, batches, total_steps)
    if not is_last:
        return []
    ends = _evaluate(task, trainees, held)
    problems = []
    for path, trainee, start, end in zip(paths, trainees, starts, ends, strict=True):
        problems.append(_keep(tokens_each, layer, trainee, start, end, parent.dtype))
        path.unlink(missing_ok=True)
    return [problem for problem in problems if problem]


def _train(
    task: BlockTask,
    trainees: Sequence[Trainee],
    paths: Sequence[Path],
    shard: Shard,
    batches: Sequence[torch.Tensor],
    total_steps: int,
) -> None:
    """All steps of a shard, from wherever the last run stopped."""
    begins = [_load_checkpoint(path, trainee) for path, trainee in zip(paths, trainees, strict=True)]
    if min(begins) < shard.first_step:
        raise ArtifactError(f"A checkpoint in {paths[0].parent} is gone. Run the same command again; it starts again.")
    steps = Steps(task, trainees, len(batches[0]))
    batches = [sequences.to(task.activations.device) for sequences in batches]
    for step in range(min(begins), shard.end_step):
        # One that was written just before a kill is ahead of the others.
        pending = {path: t for path, t, begin in zip(paths, trainees, begins, strict=True) if step >= begin}
        steps.take(step, batches[step - shard.first_step], list(pending.values()))
        is_due = (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == shard.end_step
        if is_due and step + 1 < total_steps:
            for path, trainee in pending.items():
                _save_checkpoint(path, trainee, step + 1)


def _save_checkpoint(path: Path, trainee: Trainee, step: int) -> None:
    tensors = trainee.optimiser.state() | {"losses": torch.tensor(trainee.read_losses(), dtype=torch.float64)}
    write_checkpoint(path, tensors, step)


def _saved_step(path: Path) -> int:
    kept = read_checkpoint(path)
    return kept[1] if kept else 0


def _load_checkpoint(path: Path, trainee: Trainee) -> int:
    """The step to continue with."""
    kept = read_checkpoint(path)
    if kept is None:
        return 0
    tensors, step = kept
    trainee.losses = tensors.pop("losses").tolist()
    trainee.optimiser.load(tensors)
    return step


@torch.no_grad()
def _evaluate(task: BlockTask, trainees: Sequence[Trainee], sequences: torch.Tensor) -> list[float]:
    batch = task.fetch(sequences)
    return [task.loss(trainee, batch).item() for trainee in trainees]


def _keep(tokens_each: int, layer: int, trainee: Trainee, start: float, end: float, dtype: torch.dtype) -> str | None:
    """Store what was trained, or its start if that was better; the sentence to print when BLD had trouble."""
    job, fell_back = trainee.job, not (math.isfinite(end) and end <= start)
    losses = trainee.read_losses()
    stride = max(1, math.ceil(len(losses) / CURVE_POINTS))
    curve = [sum(losses[i : i + stride]) / len(losses[i : i + stride]) for i in range(0, len(losses), stride)]
    facts = {
        **job.facts,
        "tokens": tokens_each,
        "held_out_loss_start": start if math.isfinite(start) else None,
        "held_out_loss_end": end if math.isfinite(end) else None,
        "fell_back": fell_back,
        "loss_curve": [value if math.isfinite(value) else None for value in curve],
    }
    write_variant(job.path, job.specs, trainee.start if fell_back else trainee.weights(dtype), facts)
    if not fell_back:
        left_out = sum(not math.isfinite(loss) for loss in losses)
        if not left_out:
            return None
        steps = f"{left_out} of {len(losses)} steps of BLD"
        return f"Layer {layer}, {job.id}: the loss was not finite in {steps}; they were left out."
    how = f"rose from {start:.4g} to {end:.4g}" if math.isfinite(end) else "became NaN"
    return f"Layer {layer}, {job.id}: the loss {how} in BLD; its initialisation is kept."
