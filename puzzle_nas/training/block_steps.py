"""One step of blockwise local distillation: what is trained in a layer, on which batch, by which loss.

Shapes: B sequences in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from puzzle_nas.architecture import choice_id
from puzzle_nas.families import Anatomy, SubBlock
from puzzle_nas.recipe import BLDSettings
from puzzle_nas.specs import Spec
from puzzle_nas.subblocks import Weights, made_subblock, weights_of_slot
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.losses import block_loss, error_weight
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.step_graph import StepGraph, side_by_side


@dataclass(frozen=True)
class Job:
    """What is trained in one layer: a variant with the parent's frozen other sub-block, or a pair of both slots."""

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


class Trainee:
    """One job in training: its sub-blocks in float32, by slot, their optimiser, the losses.

    Norms stay as they are: their weights only scale columns of the matrices behind them, which train. So everything
    that reads the parent's norm shares one input, into which no gradient needs to flow.
    """

    def __init__(
        self, job: Job, start: Weights, parent: PreTrainedModel, layer: int, settings: BLDSettings, steps: int
    ):
        self.job = job
        self.start = start
        master = {n: w.to(device=parent.device, dtype=torch.float32, copy=True) for n, w in start.items()}
        self.subblocks: dict[str, SubBlock] = {}
        self.reads_parents_norm: dict[str, bool] = {}
        parents = Anatomy(parent).subblocks(layer)
        for spec in job.specs:
            own = weights_of_slot(master, parents[spec.slot])
            subblock = made_subblock(parent, layer, spec, own)
            self.subblocks[spec.slot] = subblock
            if not subblock.empty:
                subblock.mixer.requires_grad_(True)
                self.reads_parents_norm[spec.slot] = _same_weights(subblock.norm, parents[spec.slot].norm)
        self.blocks = torch.nn.ModuleDict({slot: subblock.layer for slot, subblock in self.subblocks.items()})
        self.optimiser = Optimiser(self.blocks, settings.learning_rate, steps)
        self.losses: list[float] = []
        self._unread: list[torch.Tensor] = []

    def note(self, loss: torch.Tensor) -> None:
        """Add a step's loss to `losses`, without waiting for the device that computes it."""
        self._unread.append(loss)

    def read_losses(self) -> list[float]:
        """`losses` with all that was noted."""
        if self._unread:
            self.losses += torch.stack(self._unread).tolist()
            self._unread.clear()
        return self.losses

    def weights(self, dtype: torch.dtype) -> Weights:
        """As trained, named as in the library."""
        parameters = self.blocks.named_parameters()
        return {name.split(".", 1)[1]: parameter.detach().to(dtype) for name, parameter in parameters}


def _same_weights(norm: torch.nn.Module | None, other: torch.nn.Module | None) -> bool:
    if norm is None or other is None:
        return norm is other
    return all(torch.equal(w, v.float()) for w, v in zip(norm.parameters(), other.parameters(), strict=True))


@dataclass(frozen=True)
class Batch:
    """What all of a layer's jobs share in one step. Each tensor is [B, T, D]."""

    parents: Mapping[str, SubBlock]
    x: torch.Tensor
    added: Mapping[str, torch.Tensor]
    """See `LayerActivations`."""
    weight: torch.Tensor
    """What a squared error counts in the loss, [B, T]."""

    @functools.cached_property
    def streams(self) -> dict[str, torch.Tensor]:
        """By slot, the residual stream in front of it, in the parent."""
        found, stream = {}, self.x
        for slot, added in self.added.items():
            found[slot] = stream
            stream = stream + added
        return found

    @functools.cached_property
    def read(self) -> dict[str, torch.Tensor]:
        """By slot, what the parent's mixer reads."""
        return {slot: self.parents[slot].read(stream) for slot, stream in self.streams.items()}


class BlockTask:
    """One layer's training data and loss."""

    def __init__(self, activations: LayerActivations, autocast: bool):
        self.activations = activations
        self.parents = activations.parts.subblocks(activations.layer)
        self.device = activations.parent.device
        self.inputs = activations.inputs[activations.layer]
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast)

    def read(self, sequences: torch.Tensor) -> list[torch.Tensor]:
        """The activations x, then what each slot adds, of some sequences."""
        files = (self.activations.x, *self.activations.added.values())
        return [file.tensor[sequences].to(self.device) for file in files]

    def batch(self, x: torch.Tensor, *added: torch.Tensor) -> Batch:
        """What all jobs share, of what was read."""
        output = x.to(torch.float32, copy=True)
        for part in added:
            output.add_(part)
        by_slot = dict(zip(self.parents, added, strict=True))
        return Batch(self.parents, x, by_slot, error_weight(output))

    def fetch(self, sequences: torch.Tensor) -> Batch:
        """The batch of some sequences."""
        return self.batch(*self.read(sequences))

    def loss(self, trainee: Trainee, batch: Batch) -> torch.Tensor:
        """Normalised error of the whole block's output; a slot that is not trained is the parent's, frozen."""
        children: dict[str, torch.Tensor] = {}
        stream: torch.Tensor | None = None
        with self.autocast:
            for slot, parents in self.parents.items():
                if slot in trainee.subblocks:
                    children[slot] = self._trained(trainee, slot, batch, stream)
                elif stream is not None:
                    children[slot] = parents.added(stream, self.inputs)
                else:
                    # As in the parent so far.
                    continue
                stream = (batch.streams[slot] if stream is None else stream) + children[slot]
        return block_loss(batch.weight, list(children.values()), [batch.added[slot] for slot in children])

    def _trained(self, trainee: Trainee, slot: str, batch: Batch, stream: torch.Tensor | None) -> torch.Tensor:
        """What a trainee's sub-block adds; `stream` is None where that in front of it is the parent's."""
        subblock = trainee.subblocks[slot]
        if subblock.empty:
            return torch.zeros_like(batch.x)
        if stream is not None:
            return subblock.added(stream, self.inputs)
        shared = trainee.reads_parents_norm[slot]
        read = batch.read[slot] if shared else subblock.read(batch.streams[slot])
        return subblock.finished(subblock.mixed(read, self.inputs))

    def update(self, trainee: Trainee, batch: Batch, rate: float | torch.Tensor) -> torch.Tensor:
        """One update of a trainee, see `Optimiser.update`; its loss before, scalar."""
        loss = self.loss(trainee, batch)
        loss.backward()
        trainee.optimiser.update(rate, loss)
        return loss.detach()


SIDE_BY_SIDE_BYTES = 32 << 20
"""A residual stream [B, T, D] up to which all trainees of a captured step run at the same time. A larger one fills the
GPU by itself, and what each trainee needs besides would add up."""


class Steps:
    """Steps of several trainees of a layer, each on the same batches.

    On a GPU, a step that comes for the second time is captured (`StepGraph`).
    """

    def __init__(self, task: BlockTask, trainees: Sequence[Trainee], batch_sequences: int):
        self.task, self.trainees, self.batch_sequences = task, trainees, batch_sequences
        self.schedule = trainees[0].optimiser
        self.can_capture = task.device.type == "cuda"
        self.graph: StepGraph | None = None
        self.is_warm = False

    def take(self, step: int, sequences: torch.Tensor, trainees: Sequence[Trainee]) -> None:
        """One step of some of the trainees."""
        rate = self.schedule.rate_at(step)
        is_whole = len(trainees) == len(self.trainees) and len(sequences) == self.batch_sequences
        inputs = self.task.read(sequences)
        if is_whole and self.can_capture and self.is_warm:
            if self.graph is None:
                self.graph = StepGraph(self._all, [tensor.clone() for tensor in inputs])
            losses = self.graph.step(rate, inputs)
        else:
            batch = self.task.batch(*inputs)
            losses = [self.task.update(trainee, batch, rate) for trainee in trainees]
            self.is_warm = is_whole
        for trainee, loss in zip(trainees, losses, strict=True):
            trainee.note(loss)

    def _all(self, rate: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The losses of all trainees, [number of trainees], each of which is updated."""
        batch = self.task.batch(*inputs)
        # All read these, so none may compute them.
        _ = batch.streams, batch.read
        works = [functools.partial(self.task.update, trainee, batch, rate) for trainee in self.trainees]
        is_small = batch.x.nbytes <= SIDE_BY_SIDE_BYTES
        return torch.stack(side_by_side(works) if is_small else [work() for work in works])
