"""Closed-form correction of an assembled child, layer by layer on the child's own activations. Beyond the paper.

Replace-1-block variants were fitted to the parent's activations, but in the child every layer also receives the
errors of those below. One pass solves each output projection again so that the child's residual stream meets the
parent's at the same depth: W minimising sum w |context W' - (h_parent - h_child)|^2 + ridge |W - W_now|^2, tokens
weighted by 1 / |h_parent|^2. The ridge is the mean diagonal of RIDGE_TOKENS tokens' Gram matrix.

The same pass rounds what the child stores in formats: the matrices inside a sub-block first, each by the Gram matrix of
what it receives in the child, then the last one by that of the least squares, so that it makes up for the others.
Experts of mixtures are rounded too (`expert_rounding`), and not solved for.

Shapes: S sequences, B of them in a batch, T tokens, D hidden, I width of a projection's input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from puzzle_nas.estimates import finite
from puzzle_nas.families import Anatomy, LayerInputs, SubBlock, architecture_of
from puzzle_nas.formats.registry import format_of
from puzzle_nas.formats.rounding import damped, round_matrix
from puzzle_nas.formats.stored import Matrices, Matrix, parameter_of, put
from puzzle_nas.library import Place
from puzzle_nas.machine import free_bytes
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.scoring.replacement import final_states
from puzzle_nas.specs import Mixture, Spec
from puzzle_nas.subblocks import made_subblock, subblock_weights
from puzzle_nas.subblocks.layers import Weights
from puzzle_nas.subblocks.statistics import fast_products, inverse_norm
from puzzle_nas.training.expert_rounding import round_experts

BATCH_TOKENS = 4096
RIDGE_TOKENS = 6144.0
"""The pull towards the present weights is as strong as so many tokens of the calibration text are on the mean."""
NOTHING: Mapping[Place, Matrices] = MappingProxyType({})
Goals: TypeAlias = dict[Place, list[torch.Tensor]]
"""The parent's residual stream after each sub-block, by layer and slot, each [B, T, D]."""


def room_for_goals(parent: PreTrainedModel, tokens_ST: torch.Tensor) -> Goals | None:
    """Empty, for several children's `refit`; None where it would take more than an eighth of the free memory."""
    one = tokens_ST.numel() * Anatomy(parent).head.weight.shape[1] * parent.dtype.itemsize
    number = sum(len(block) for block in architecture_of(parent.config).layers)
    return {} if one * number < free_bytes(parent.device) / 8 else None


def refit(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    tokens_ST: torch.Tensor,
    on_layer: Callable[[], None] = lambda: None,
    goals: Goals | None = None,
    already: Mapping[Place, Matrices] = NOTHING,
) -> Matrices:
    """Correct the child in place, bottom to top. Weights that it shares with the parent are replaced, not changed.

    Args:
        goals: what is in it is not computed again, and what is not is put there.
        already: what is rounded and stays as it is, as for `rounded`.

    Returns:
        What is stored in formats, by the names of the weights.

    Raises:
        FormatError: a format does not hold a matrix.
    """
    return _walked(parent, child, tokens_ST, goals, RIDGE_TOKENS / tokens_ST.numel(), already, on_layer)


def rounded(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    tokens_ST: torch.Tensor,
    already: Mapping[Place, Matrices],
    goals: Goals | None = None,
) -> Matrices:
    """Round what the child stores in formats, in place, and correct nothing.

    Args:
        already: what is rounded already, by layer and slot (the ends behind the last layer), by the names of weights.
        goals: as for `refit`.

    Returns:
        What is stored in formats, by the names of the weights.

    Raises:
        FormatError: a format does not hold a matrix.
    """
    architecture = architecture_of(child.config)
    missing = {(layer, slot) for layer, slot, spec in architecture if spec.format and not spec.empty} - set(already)
    if architecture.head.format:
        missing |= {(len(architecture.layers), architecture.head.slot)} - set(already)
    return _walked(parent, child, tokens_ST, goals, None, already) if missing else _taken(child, already)


def _taken(child: PreTrainedModel, already: Mapping[Place, Matrices]) -> Matrices:
    stored = {name: matrix for matrices in already.values() for name, matrix in matrices.items()}
    put(child, stored)
    return stored


def _walked(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    tokens_ST: torch.Tensor,
    goals: Goals | None,
    ridge: float | None,
    already: Mapping[Place, Matrices],
    on_layer: Callable[[], None] = lambda: None,
) -> Matrices:
    """Every sub-block but those that are rounded `already`, from the bottom to the top."""
    architecture, stored = architecture_of(child.config), _taken(child, already)
    batches = tokens_ST.split(max(1, BATCH_TOKENS // tokens_ST.shape[1]))
    theirs, mine = Anatomy(parent), Anatomy(child)
    their_inputs, my_inputs = (parts.inputs(tokens_ST.shape[1]) for parts in (theirs, mine))
    with torch.inference_mode():
        goal = [theirs.embed(batch.to(parent.device)) for batch in batches]
        hidden = goal
        if architecture.head.format and (len(architecture.layers), architecture.head.slot) not in already:
            final = final_states(parent, tokens_ST, len(batches[0]))
            stored |= rounded_ends(parent, architecture.head.format, final)
            put(child, stored)
        if architecture.head.format:
            hidden = [mine.embed(batch.to(parent.device)) for batch in batches]
        for layer in range(len(theirs.layers)):
            subblocks = mine.subblocks(layer)
            for slot, subblock in theirs.subblocks(layer).items():
                if goals is not None and (layer, slot) in goals:
                    goal = goals[layer, slot]
                else:
                    goal = [h + subblock.added(h, their_inputs[layer]) for h in goal]
                    if goals is not None:
                        goals[layer, slot] = goal
                spec = architecture.layers[layer][slot]
                if (layer, slot) in already:
                    hidden = [h + subblocks[slot].added(h, my_inputs[layer]) for h in hidden]
                    continue
                corrected = Correction(subblocks[slot], spec, my_inputs[layer], ridge)
                hidden = corrected.applied(hidden, goal)
                stored |= {f"{mine.layer_prefix}{layer}.{name}": m for name, m in corrected.stored.items()}
            on_layer()
    return stored


@dataclass(frozen=True)
class RefitKL:
    """KL(parent || child) in nats before and after refitting, on other text than that; None where it is not finite."""

    before: float | None
    after: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the refitted child is the better one."""
        return self.after is not None and (self.before is None or self.after < self.before)

    @property
    def best(self) -> float:
        """Of the better one; NaN where neither is finite."""
        kl = self.after if self.kept else self.before
        return math.nan if kl is None else kl


def refit_if_better(
    parent: PreTrainedModel,
    child: PreTrainedModel,
    reference: ParentReference,
    tokens_ST: torch.Tensor,
    on_layer: Callable[[], None] = lambda: None,
    goals: Goals | None = None,
    already: Mapping[Place, Matrices] = NOTHING,
) -> tuple[PreTrainedModel, Matrices, RefitKL]:
    """The better of a child and its refitted copy on the reference's text, and what it stores in formats.

    The child stays as it is. One in formats, which is not rounded yet, is only measured refitted.

    Args:
        goals, already: as for `refit`.
    """
    # Tensors are shared: refitting replaces those that it changes.
    refitted = copy.deepcopy(child, {id(tensor): tensor for tensor in (*child.parameters(), *child.buffers())})
    stored = refit(parent, refitted, tokens_ST, on_layer, goals, already)
    before = None if stored else finite(reference.compare(child).kl_nats)
    found = RefitKL(before, finite(reference.compare(refitted).kl_nats))
    return (refitted, stored, found) if found.kept else (child, {}, found)


def rounded_alone(
    parent: PreTrainedModel,
    layer: int,
    spec: Spec,
    hidden: Sequence[torch.Tensor],
    goal: Sequence[torch.Tensor],
    inputs: LayerInputs,
) -> tuple[Weights, Matrices]:
    """The parent's own sub-block in the format of `spec`, rounded where the parent reads `hidden`, by names in a layer.

    Args:
        hidden, goal: the parent's residual stream below the sub-block, and after it, each [B, T, D].
    """
    own = Anatomy(parent).subblocks(layer)[spec.slot]
    subblock = made_subblock(parent, layer, spec, subblock_weights(own))
    tokens = sum(h.shape[:2].numel() for h in hidden)
    correction = Correction(subblock, spec, inputs, RIDGE_TOKENS / tokens)
    correction.applied(list(hidden), list(goal))
    return subblock_weights(subblock), correction.stored


def rounded_ends(parent: PreTrainedModel, form: str, final_states: Sequence[torch.Tensor]) -> Matrices:
    """Embeddings and LM head in a format, by the names of their weights; tied ones once.

    Args:
        final_states: of the parent, each [B, T, D].
    """
    gram = sum((h.flatten(0, 1).float().T @ h.flatten(0, 1).float()).double() for h in final_states)
    assert isinstance(gram, torch.Tensor)
    embeddings, head = parent.get_input_embeddings().weight, parent.get_output_embeddings().weight
    stored: Matrices = {}
    # Of tied ones this is the embeddings' name.
    for name, weight in parent.named_parameters():
        if weight is embeddings:
            # In a lookup all columns count alike, but what the head computes matters more.
            metric = damped(gram, 0.1) if weight is head else None
        elif weight is head:
            metric = gram
        else:
            continue
        stored[name] = Matrix(form, round_matrix(format_of(form), weight, metric))
    return stored


class _Received(Exception):
    """All that was asked for was seen: the rest of the pass is not needed."""


def _note(
    received: dict[int, torch.Tensor], wanted: int, place: int, _: nn.Module, arguments: tuple[torch.Tensor, ...]
) -> None:
    received[place] = arguments[0]
    if len(received) == wanted:
        raise _Received


class Correction:
    """One sub-block of a child, in place: its inner matrices rounded, its last one solved for and rounded.

    The experts of a mixture are rounded and not solved for.

    Args:
        ridge: relative to the mean diagonal of the Gram matrix; None leaves the last matrix as it is but for rounding.
    """

    def __init__(self, subblock: SubBlock, spec: Spec, inputs: LayerInputs, ridge: float | None):
        self.subblock, self.spec, self.inputs, self.ridge = subblock, spec, inputs, ridge
        self.form = None if spec.empty else spec.format
        self.stored: Matrices = {}
        """What was rounded, by names relative to the layer."""

    def applied(self, hidden: list[torch.Tensor], goal: list[torch.Tensor]) -> list[torch.Tensor]:
        """The residual stream after the sub-block, each [B, T, D].

        Args:
            hidden, goal: the child's below it, and the parent's after its own.
        """
        subblock = self.subblock
        if self.form is not None:
            self._round_inside(hidden)
            if isinstance(self.spec, Mixture):
                read_ND = torch.cat([subblock.read(h).flatten(0, 1) for h in hidden])
                importance_N = torch.cat([inverse_norm(wanted.flatten(0, 1), 2) for wanted in goal])
                self.stored |= round_experts(subblock, self.form, read_ND, importance_N)
        if (matrix := subblock.last) is None or (self.ridge is None and self.form is None):
            return [h + subblock.added(h, self.inputs) for h in hidden]
        found = [subblock.with_last_input(subblock.read(h), self.inputs) for h in hidden]
        added = [subblock.finished(mixed) for mixed, _ in found]
        reached = [h + a for h, a in zip(hidden, added, strict=True)]
        if self.form is None and all(map(torch.equal, reached, goal)):
            # Still below the child's first change.
            return reached
        gram, cross = 0.0, 0.0
        for h, (mixed, context), now, wanted in zip(hidden, found, added, goal, strict=True):
            x = context.flatten(0, 1).float()
            importance_N = inverse_norm(wanted.flatten(0, 1), 2)
            if subblock.place.output_norm is not None:
                # It divides what the mixer gives by its norm, and the error with it.
                importance_N = importance_N * inverse_norm(mixed.flatten(0, 1), 2)
            weighted = (x * importance_N[:, None]).T
            with fast_products(context):
                gram = gram + (weighted @ x).double()
                if self.ridge is not None:
                    error = subblock.before_output(wanted.float() - h.float() - now.float(), mixed, now)
                    cross = cross + (weighted @ error.flatten(0, 1)).double()
        assert isinstance(gram, torch.Tensor)
        weight = matrix.weight.double()
        if self.ridge is not None:
            damping = self.ridge * gram.diagonal().mean().clamp_min(1e-20)
            weight = weight + torch.linalg.solve(gram + damping * torch.eye(len(gram)).to(gram), cross).T
        if self.form is None:
            # A new tensor: the present one may be shared with the parent.
            matrix.weight = nn.Parameter(weight.to(matrix.weight), requires_grad=False)
        else:
            self._round([matrix], [weight], gram)
        return [
            h + subblock.finished(matrix(context).view(mixed.shape))
            for h, (mixed, context) in zip(hidden, found, strict=True)
        ]

    def _round_inside(self, hidden: list[torch.Tensor]) -> None:
        """Round all matrices of the mixer but the last one."""
        last = self.subblock.last
        inner = [m for m in self.subblock.matrices.values() if isinstance(m, nn.Linear) and m is not last]
        grams: dict[int, torch.Tensor] = {}
        shared: dict[int, int] = {}
        """Of each matrix the first one that receives the same."""
        for h in hidden if inner else ():
            received: dict[int, torch.Tensor] = {}
            note = partial(_note, received, len(inner))
            hooks = [m.register_forward_pre_hook(partial(note, place)) for place, m in enumerate(inner)]
            try:
                self.subblock.added(h, self.inputs)
            except _Received:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
            for place, x in received.items():
                first = shared.setdefault(place, next(p for p, other in received.items() if other is x))
                if first == place:
                    flat = x.flatten(0, -2).float()
                    with fast_products(x):
                        grams[place] = grams.get(place, 0) + (flat.T @ flat).double()
        for first, gram in grams.items():
            together = [matrix for place, matrix in enumerate(inner) if shared[place] == first]
            self._round(together, [matrix.weight for matrix in together], gram)

    def _round(self, matrices: Sequence[nn.Linear], weights_OI: Sequence[torch.Tensor], gram_II: torch.Tensor) -> None:
        """Matrices that receive the same, as one: rows do not depend on each other."""
        assert self.form is not None
        rounded = round_matrix(format_of(self.form), torch.cat(list(weights_OI)), gram_II)
        names = {module: name for name, module in self.subblock.layer.named_modules()}
        for matrix, part in zip(matrices, rounded.split([len(weight) for weight in weights_OI]), strict=True):
            made = Matrix(self.form, part)
            self.stored[f"{names[matrix]}.weight"] = made
            matrix.weight = parameter_of(made, matrix.weight)
