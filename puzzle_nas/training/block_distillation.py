"""Blockwise local distillation, decoupled and coupled (Puzzle, section 2).

Layer by layer: the parent's activations of layer i lie in memory-mapped files, everything of layer i trains on them,
then layer i + 1. Each parent layer sees each token once; a layer that is done is done for good.

Shapes: S sequences, B of them in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from puzzle_nas.architecture import Spec, choice_id
from puzzle_nas.artifacts import RunFolder, fingerprint
from puzzle_nas.library import variant_is_stored, write_variant
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import BLDSettings
from puzzle_nas.subblocks import Weights, subblock_layer, weights_of_slot
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.checkpoints import read_checkpoint, write_checkpoint
from puzzle_nas.training.losses import block_loss, error_weight
from puzzle_nas.training.optimiser import Optimiser

CURVE_POINTS = 40
TRAINING_BYTES_PER_PARAMETER = 24
"""Master weight, gradient, two moments, a bfloat16 copy, and slack."""


@dataclass(frozen=True)
class Job:
    """What is trained in one layer: a variant beside the parent's frozen other sub-block, or a pair of both slots."""

    specs: tuple[Spec, ...]
    path: Path
    """Where it goes."""
    start: Callable[[], Weights]
    """Reads the weights to start from; none at all for what has none."""
    facts: Mapping[str, Any]
    """What is written beside the weights, before BLD adds to it."""

    @property
    def id(self) -> str:
        """`ffn.w384`, or `attention.kv1+ffn.w384`."""
        return choice_id(self.specs)


NORMS = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}


class Trainee:
    """One job in training: its sub-blocks in float32, by slot, their optimiser, the losses.

    Norms stay as they are: their weights only scale columns of the matrices behind them, which train. So everything
    that reads the parent's norm shares one input, into which no gradient needs to flow.
    """

    def __init__(
        self,
        job: Job,
        start: Weights,
        parent: PuzzleForCausalLM,
        layer: PuzzleDecoderLayer,
        settings: BLDSettings,
        steps: int,
    ):
        self.job = job
        self.start = start
        master = {n: w.to(device=parent.device, dtype=torch.float32, copy=True) for n, w in start.items()}
        self.blocks = torch.nn.ModuleDict()
        self.reads_parents_norm: dict[str, bool] = {}
        for spec in job.specs:
            own = weights_of_slot(master, spec.slot)
            block = subblock_layer(parent.config, layer.layer_type, spec, own).requires_grad_(True)
            self.blocks[spec.slot] = block
            if (norm := getattr(block, NORMS[spec.slot])) is not None:
                norm.requires_grad_(False)
                parents = getattr(layer, NORMS[spec.slot]).weight
                self.reads_parents_norm[spec.slot] = torch.equal(norm.weight, parents.float())
        self.optimiser = Optimiser(self.blocks, settings, steps)
        self.losses: list[float] = []

    def weights(self, dtype: torch.dtype) -> Weights:
        """As trained, named as in the library."""
        parameters = self.blocks.named_parameters()
        return {name.split(".", 1)[1]: parameter.detach().to(dtype) for name, parameter in parameters}


@dataclass(frozen=True)
class Batch:
    """What all of a layer's jobs share in one step."""

    layer: PuzzleDecoderLayer
    """The parent's."""
    x: torch.Tensor
    attention: torch.Tensor
    ffn: torch.Tensor
    """See `LayerActivations`; each [B, T, D]."""
    weight: torch.Tensor
    """What a squared error counts in the loss, [B, T]."""

    @cached_property
    def middle(self) -> torch.Tensor:
        """The residual stream after the parent's attention."""
        return self.x + self.attention

    @cached_property
    def attention_in(self) -> torch.Tensor:
        """What the parent's attention reads."""
        return self.layer.input_layernorm(self.x)

    @cached_property
    def ffn_in(self) -> torch.Tensor:
        """What the parent's FFN reads."""
        return self.layer.post_attention_layernorm(self.middle)


class BlockTask:
    """One layer's training data and loss."""

    def __init__(self, activations: LayerActivations, parent_layer: PuzzleDecoderLayer, normalise: str, autocast: bool):
        self.activations, self.parent_layer, self.normalise = activations, parent_layer, normalise
        self.device = activations.parent.device
        masks = activations.inputs["attention_mask"].get(parent_layer.layer_type)
        self.inputs = {**activations.inputs, "attention_mask": masks}
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast)

    def fetch(self, sequences: torch.Tensor) -> Batch:
        """The activations of some sequences."""
        files = (self.activations.x, self.activations.attention, self.activations.ffn)
        x, attention, ffn = (file.tensor[sequences].to(self.device) for file in files)
        output = x.to(torch.float32, copy=True).add_(attention).add_(ffn)
        return Batch(self.parent_layer, x, attention, ffn, error_weight(output, self.normalise))

    def loss(self, trainee: Trainee, batch: Batch) -> torch.Tensor:
        """Normalised error of the whole block's output; a slot that is not trained is the parent's, frozen."""
        with self.autocast:
            if "attention" in trainee.blocks:
                attention = self._attention(trainee, batch)
                children = {"attention": attention, "ffn": self._ffn(trainee, batch, batch.x + attention)}
            else:
                children = {"ffn": self._ffn(trainee, batch, None)}
        return block_loss(batch.weight, list(children.values()), [getattr(batch, slot) for slot in children])

    def _attention(self, trainee: Trainee, batch: Batch) -> torch.Tensor:
        """What attention adds to the residual stream."""
        block = trainee.blocks["attention"]
        if block.self_attn is None:
            return torch.zeros_like(batch.x)
        shared = trainee.reads_parents_norm["attention"]
        return block.self_attn(batch.attention_in if shared else block.input_layernorm(batch.x), **self.inputs)[0]

    def _ffn(self, trainee: Trainee, batch: Batch, middle: torch.Tensor | None) -> torch.Tensor:
        """What the FFN adds to the residual stream; `middle` is None where that is the parent's."""
        block = trainee.blocks["ffn"] if "ffn" in trainee.blocks else self.parent_layer  # noqa: SIM401
        if block.mlp is None:
            return torch.zeros_like(batch.x)
        if middle is None and trainee.reads_parents_norm["ffn"]:
            return block.mlp(batch.ffn_in)
        return block.mlp(block.post_attention_layernorm(batch.middle if middle is None else middle))


def distill_blocks(
    run: RunFolder,
    stage: str,
    settings: BLDSettings,
    seed: int,
    parent: PuzzleForCausalLM,
    all_tokens_ST: torch.Tensor,
    jobs: Sequence[Sequence[Job]],
    order: Callable[[int, int, int], torch.Tensor],
) -> None:
    """Train every layer's jobs that are not stored yet, and store them; what has no weights is stored as it is.

    Args:
        stage: whose scratch folder to use.
        jobs: one list for each layer.
        order: `data.batches.block_order`.
    """
    length = all_tokens_ST.shape[1]
    batch_sequences = max(1, settings.batch_tokens // length)
    held_out = min(batch_sequences, max(1, len(all_tokens_ST) // 4))
    wanted = math.ceil(settings.tokens / length)
    tokens = all_tokens_ST[: min(len(all_tokens_ST), wanted + held_out)]
    held = torch.arange(len(tokens) - held_out, len(tokens))
    pending = [[job for job in layer_jobs if not variant_is_stored(job.path)] for layer_jobs in jobs]
    # Above the last layer with work there is nothing to walk to.
    working = [index for index, layer_jobs in enumerate(pending) if layer_jobs]
    problems: list[str] = []
    if not working:
        return
    with progress("distil blocks, layer", working[-1] + 1) as ticker:
        activations = LayerActivations(parent, tokens, run.scratch(stage))
        activations.skip_to(working[0], ticker)
        for index in range(working[0], working[-1] + 1):
            activations.compute(index)
            if pending[index]:
                layer = parent.model.layers[index]
                task = BlockTask(activations, layer, settings.normalise, parent.dtype == torch.bfloat16)
                batches = order(len(tokens) - held_out, wanted, seed + index).split(batch_sequences)
                for group in _groups(pending[index]):
                    trainees = [Trainee(job, start, parent, layer, settings, len(batches)) for job, start in group]
                    what = fingerprint({t.job.id: list(t.optimiser.parameters) for t in trainees})
                    path = run.scratch(stage) / f"layer_{index:02d}.{what}.safetensors"
                    starts = _evaluate(task, trainees, held)
                    _train(task, trainees, batches, path, settings.checkpoint_every_steps)
                    ends = _evaluate(task, trainees, held)
                    for trainee, start, end in zip(trainees, starts, ends, strict=True):
                        problem = _keep(settings, index, trainee, start, end, parent.dtype)
                        problems += [problem] if problem else []
                    path.unlink(missing_ok=True)
            if index < working[-1]:
                activations.advance()
            ticker.advance()
        activations.delete()
    for problem in problems:
        console.print(f"  {problem}")


def _groups(jobs: Sequence[Job]) -> list[list[tuple[Job, Weights]]]:
    """Jobs that train together, with their start: as many as fit in half of the free memory."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    groups: list[list[tuple[Job, Weights]]] = []
    room = 0.0
    for job in jobs:
        start = job.start()
        if not start:
            write_variant(job.path, job.specs, {}, {"tokens": 0})
            continue
        need = TRAINING_BYTES_PER_PARAMETER * sum(w.numel() for w in start.values())
        if not groups or need > room:
            groups.append([])
            room = free / 2
        groups[-1].append((job, start))
        room -= need
    return groups


def _train(task: BlockTask, trainees: Sequence[Trainee], batches: Sequence[torch.Tensor], path: Path, every: int):
    begin = _load_checkpoint(path, trainees)
    for step in range(begin, len(batches)):
        batch = task.fetch(batches[step])
        for trainee in trainees:
            loss = task.loss(trainee, batch)
            trainee.losses.append(loss.item())
            if math.isfinite(trainee.losses[-1]):
                loss.backward()
                trainee.optimiser.step(step)
        if (step + 1) % every == 0 and step + 1 < len(batches):
            _save_checkpoint(path, trainees, step + 1)


def _save_checkpoint(path: Path, trainees: Sequence[Trainee], step: int) -> None:
    tensors = {f"{t.job.id}/{name}": w for t in trainees for name, w in t.optimiser.state().items()}
    tensors |= {f"{t.job.id}/losses": torch.tensor(t.losses, dtype=torch.float64) for t in trainees}
    write_checkpoint(path, tensors, step)


def _load_checkpoint(path: Path, trainees: Sequence[Trainee]) -> int:
    """The step to continue with."""
    kept = read_checkpoint(path)
    if kept is None:
        return 0
    tensors, step = kept
    for trainee in trainees:
        prefix = f"{trainee.job.id}/"
        own = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
        trainee.losses = own.pop("losses").tolist()
        trainee.optimiser.load(own)
    return step


@torch.no_grad()
def _evaluate(task: BlockTask, trainees: Sequence[Trainee], sequences: torch.Tensor) -> list[float]:
    batch = task.fetch(sequences)
    return [task.loss(trainee, batch).item() for trainee in trainees]


def _keep(
    settings: BLDSettings, layer: int, trainee: Trainee, start: float, end: float, dtype: torch.dtype
) -> str | None:
    """Store what was trained, or its start if that was better; the sentence to print when BLD had trouble."""
    job, fell_back = trainee.job, not (math.isfinite(end) and end <= start)
    stride = max(1, math.ceil(len(trainee.losses) / CURVE_POINTS))
    curve = [
        sum(trainee.losses[i : i + stride]) / len(trainee.losses[i : i + stride])
        for i in range(0, len(trainee.losses), stride)
    ]
    facts = {
        **job.facts,
        "tokens": settings.tokens,
        "held_out_loss_start": start if math.isfinite(start) else None,
        "held_out_loss_end": end if math.isfinite(end) else None,
        "fell_back": fell_back,
        "loss_curve": [value if math.isfinite(value) else None for value in curve],
    }
    write_variant(job.path, job.specs, trainee.start if fell_back else trainee.weights(dtype), facts)
    if not fell_back:
        left_out = sum(not math.isfinite(loss) for loss in trainee.losses)
        if not left_out:
            return None
        steps = f"{left_out} of {len(trainee.losses)} steps of BLD"
        return f"Layer {layer}, {job.id}: the loss was not finite in {steps}; they were left out."
    how = f"rose from {start:.4g} to {end:.4g}" if math.isfinite(end) else "became NaN"
    return f"Layer {layer}, {job.id}: the loss {how} in BLD; its initialisation is kept."
