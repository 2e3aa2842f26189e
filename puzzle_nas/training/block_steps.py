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

from puzzle_nas.architecture import Spec, choice_id
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.recipe import BLDSettings
from puzzle_nas.subblocks import Weights, subblock_layer, weights_of_slot
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.losses import block_loss, error_weight
from puzzle_nas.training.optimiser import Optimiser
from puzzle_nas.training.step_graph import StepGraph, side_by_side


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

    @functools.cached_property
    def middle(self) -> torch.Tensor:
        """The residual stream after the parent's attention."""
        return self.x + self.attention

    @functools.cached_property
    def attention_in(self) -> torch.Tensor:
        """What the parent's attention reads."""
        return self.layer.input_layernorm(self.x)

    @functools.cached_property
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

    def read(self, sequences: torch.Tensor) -> list[torch.Tensor]:
        """The activations x, attention and ffn of some sequences."""
        files = (self.activations.x, self.activations.attention, self.activations.ffn)
        return [file.tensor[sequences].to(self.device) for file in files]

    def batch(self, x: torch.Tensor, attention: torch.Tensor, ffn: torch.Tensor) -> Batch:
        """What all jobs share, of what was read."""
        output = x.to(torch.float32, copy=True).add_(attention).add_(ffn)
        return Batch(self.parent_layer, x, attention, ffn, error_weight(output, self.normalise))

    def fetch(self, sequences: torch.Tensor) -> Batch:
        """The batch of some sequences."""
        return self.batch(*self.read(sequences))

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
        self.can_capture = task.device.type == "cuda" and self.schedule.settings.optimiser == "adamw"
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
        _ = batch.middle, batch.attention_in, batch.ffn_in
        works = [functools.partial(self.task.update, trainee, batch, rate) for trainee in self.trainees]
        is_small = batch.x.nbytes <= SIDE_BY_SIDE_BYTES
        return torch.stack(side_by_side(works) if is_small else [work() for work in works])
