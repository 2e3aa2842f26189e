"""Replace one block at a time and measure the damage (Puzzle, section 3: replace-1-block scores).

The walk goes up the layers once: what lies below a replaced block is computed once for all variants, the parent's
token distribution once per batch. The blocks replaced are the parent's, or those of a child.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import Anatomy, LayerInputs, SubBlock
from puzzle_nas.subblocks import run_with
from puzzle_nas.training.activations import ActivationFile
from puzzle_nas.training.losses import Divergence, divergences

BATCH_TOKENS, BATCH_TOKENS_ON_GPU = 2_048, 16_384
"""Tokens whose activations are in memory together."""


def batch_tokens_of(model: PreTrainedModel) -> int:
    """As many tokens as scores are taken on at once where a model is."""
    return BATCH_TOKENS_ON_GPU if model.device.type == "cuda" else BATCH_TOKENS


def next_tokens(tokens_ST: torch.Tensor) -> torch.Tensor:
    """The label of every position, -100 for the last of each sequence, shape [S, T]."""
    return torch.cat([tokens_ST[:, 1:], torch.full_like(tokens_ST[:, :1], -100)], dim=1)


def require_finite(parent_output: torch.Tensor) -> None:
    """Refuse a parent whose own output overflows: nothing can be learnt from it.

    Raises:
        CheckpointError: it has NaN or infinity.
    """
    if not parent_output.isfinite().all():
        precision = str(parent_output.dtype).removeprefix("torch.")
        way_out = "set precision=float32" if precision != "float32" else "its weights are damaged"
        raise CheckpointError(f"The parent computes NaN or infinity in {precision} on this run's text; {way_out}.")


@torch.inference_mode()
def climb(parts: Anatomy, states_BTD: Sequence[torch.Tensor], inputs: Sequence[LayerInputs], layers: range) -> None:
    """Carry residual streams through some layers, and the final norm where they are the last ones, in place.

    Each layer is asked for once. States may lie elsewhere than the model.
    """
    device = parts.model.device
    for index in layers:
        layer = parts.layers[index]
        for state in states_BTD:
            state.copy_(layer(state.to(device), **inputs[index].layer))
    if layers.stop == len(parts.layers):
        for state in states_BTD:
            state.copy_(parts.norm(state.to(device)))


@torch.inference_mode()
def final_states(model: PreTrainedModel, tokens_ST: torch.Tensor, batch_sequences: int) -> list[torch.Tensor]:
    """What the LM head receives, batch by batch, each [B, T, D]."""
    parts = Anatomy(model)
    states = [parts.embed(batch.to(model.device)) for batch in tokens_ST.split(batch_sequences)]
    climb(parts, states, parts.inputs(tokens_ST.shape[1]), range(len(parts.layers)))
    return states


def rounding_counts(parent: PreTrainedModel) -> bool:
    """Whether rounding alone moves the parent's distribution; in float32 it does so too little."""
    return parent.dtype != torch.float32


class RoundedOtherwise:
    """A sub-block half of whose numbers, drawn at random, are the next larger ones of their precision.

    What such a change does to the parent is what any change does besides its own damage: in bfloat16 every rounding
    above falls otherwise. SmolLM2's distribution moves by 0.002 nats so, 8-bit weights in one sub-block by 0.00001.
    """

    empty = False

    def __init__(self, own: SubBlock):
        self.own, self.slot = own, own.slot
        self._random = torch.Generator().manual_seed(0)

    def added(self, x_BTD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """See `SubBlock.added`."""
        added = self.own.added(x_BTD, inputs)
        chosen = torch.rand(added.shape, generator=self._random).to(added.device) < 0.5
        return torch.where(chosen, torch.nextafter(added, torch.full_like(added, torch.inf)), added)


class ReplacementWalk:
    """Walks a model upwards over fixed tokens; at each layer variants can be tried.

    Args:
        model: in which blocks are replaced; None means the parent itself.
        windows: of attention among what will be tried.
        scratch: a folder for what would otherwise be in memory: the residual streams of all tokens. Variants then go
            through the layers above together, so that each of those is asked for once.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        tokens_ST: torch.Tensor,
        batch_tokens: int,
        model: PreTrainedModel | None = None,
        scratch: Path | None = None,
        windows: Sequence[int] = (),
    ):
        self.parent, self.model = parent, model or parent
        self.anatomy = Anatomy(self.model)
        of_parent = Anatomy(parent)
        self.layers = range(len(of_parent.layers))
        self.labels_ST = next_tokens(tokens_ST)
        self.batch_sequences = max(1, batch_tokens // tokens_ST.shape[1])
        self.scratch = scratch
        self.hidden_STD = self._room("hidden", len(tokens_ST))
        with torch.inference_mode():
            for state, batch in zip(self._batches(self.hidden_STD), self._batches(tokens_ST), strict=True):
                state.copy_(self.anatomy.embed(batch.to(parent.device)))
            length = tokens_ST.shape[1]
            parents_inputs = of_parent.inputs(length, windows)
            self.inputs = [
                # Where the model lacks a mixer, one that is tried there gets what the parent passes to its own.
                LayerInputs(own.layer, {**parents.mixers, **own.mixers})
                for own, parents in zip(self.anatomy.inputs(length, windows), parents_inputs, strict=True)
            ]
            self.final_STD = self._room("final", len(tokens_ST)).copy_(self.hidden_STD)
            if self.model is not parent:
                for state, batch in zip(self._batches(self.final_STD), self._batches(tokens_ST), strict=True):
                    state.copy_(of_parent.embed(batch.to(parent.device)))
            climb(of_parent, self._batches(self.final_STD), parents_inputs, self.layers)
            for final in self._batches(self.final_STD):
                require_finite(final)
        self.layer = 0

    def _room(self, name: str, sequences: int) -> torch.Tensor:
        """A tensor [sequences, T, D] in memory or in scratch."""
        shape = (sequences, self.labels_ST.shape[1], self.parent.config.hidden_size)
        if self.scratch is None:
            return torch.empty(shape, dtype=self.parent.dtype, device=self.parent.device)
        return ActivationFile(self.scratch / f"{name}.bin", shape, self.parent.dtype).tensor

    def _batches(self, tensor: torch.Tensor):
        return tensor.split(self.batch_sequences)

    @torch.inference_mode()
    def advance(self) -> None:
        """Go up one layer."""
        climb(self.anatomy, self._batches(self.hidden_STD), self.inputs, range(self.layer, self.layer + 1))
        self.layer += 1

    def climb_to(self, layer: int) -> None:
        """Go up to a layer."""
        while self.layer < layer:
            self.advance()

    def rounded_otherwise(self) -> list[dict[str, Any]]:
        """What to try beside variants to learn what rounding alone does; nothing where it does little."""
        if not rounding_counts(self.parent):
            return []
        own = self.anatomy.subblocks(self.layer)
        return [{slot: RoundedOtherwise(subblock) for slot, subblock in own.items() if not subblock.empty}]

    @torch.inference_mode()
    def model_itself(self) -> Divergence:
        """The model with nothing replaced; per token, shaped [S, T]."""
        if self.model is not self.parent:
            return self.try_variants([{}])[0]
        return self._compare([batch.to(self.parent.device)] for batch in self._batches(self.final_STD))[0]

    @torch.inference_mode()
    def try_variants(self, variants: Sequence[Mapping[str, SubBlock]]) -> list[Divergence]:
        """The damage of each replacement, sub-blocks by slot, at the present layer; per token, shaped [S, T]."""
        return self._compare(self._finish(variants)) if variants else []

    def _finish(self, variants: Sequence[Mapping[str, SubBlock]]) -> Iterator[list[torch.Tensor]]:
        """What the LM head receives in each child [B, T, D], batch by batch.

        A batch at a time goes through the layers above, or, from scratch, all of them together.
        """
        device = self.parent.device
        own, above = list(self.anatomy.subblocks(self.layer).values()), self.layers[self.layer + 1 :]
        together = self.batch_sequences if self.scratch is None else len(self.hidden_STD)
        for hidden in self.hidden_STD.split(together):
            room = self._room("variants", len(variants) * len(hidden))
            children = [self._batches(child) for child in room.split(len(hidden))]
            every = [state for states in children for state in states]
            for replaced, states in zip(variants, children, strict=True):
                for state, below in zip(states, self._batches(hidden), strict=True):
                    state.copy_(run_with(own, replaced, below.to(device), self.inputs[self.layer]))
            climb(self.anatomy, every, self.inputs, above)
            for batch in zip(*children, strict=True):
                yield [state.to(device) for state in batch]

    def _compare(self, children: Iterable[list[torch.Tensor]]) -> list[Divergence]:
        """Divergences of several children, given batch by batch as final hidden states [B, T, D] of each."""
        device = self.parent.device
        parts: list[list[Divergence]] = []
        for final, labels, batch in zip(
            self._batches(self.final_STD), self._batches(self.labels_ST), children, strict=True
        ):
            heads = [Anatomy(self.parent).head, *[self.anatomy.head] * len(batch)]
            flat = [child.flatten(0, 1) for child in batch]
            parts.append(divergences(final.to(device).flatten(0, 1), flat, heads, labels.to(device).flatten()))
        return [joined(variant_parts, self.labels_ST.shape) for variant_parts in zip(*parts, strict=True)]


def joined(parts: Sequence[Divergence], shape: torch.Size) -> Divergence:
    """Batches of per-token figures as one, shaped `shape`, on the CPU."""
    fields = ("kl_nats", "lm_loss_nats", "top1_agrees")
    return Divergence(*(torch.cat([getattr(part, name) for part in parts]).view(shape).cpu() for name in fields))
