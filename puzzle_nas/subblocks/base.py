"""What every kind of variant can do: start from the parent in three ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from puzzle_nas.families.anatomy import Anatomy, SubBlock
from puzzle_nas.specs import Spec
from puzzle_nas.subblocks.layers import Weights, subblock_weights
from puzzle_nas.subblocks.statistics import LayerStatistics, Moments, Observe

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Origin:
    """The parent's own sub-block that variants start from."""

    parent: PreTrainedModel
    layer: int
    slot: str

    @property
    def subblock(self) -> SubBlock:
        """Runnable."""
        return Anatomy(self.parent).subblocks(self.layer)[self.slot]

    @property
    def mixer(self) -> Any:
        """The family's own module."""
        return self.subblock.mixer

    @property
    def weights(self) -> Weights:
        """Named relative to the layer."""
        return subblock_weights(self.subblock)

    def name(self, part: str) -> str:
        """The name, relative to the layer, of a part of the mixer."""
        return f"{self.subblock.place.mixer}.{part}"

    @property
    def last_name(self) -> str:
        """The name, relative to the layer, of the weight of the mixer's last matrix."""
        return self.name(f"{self.subblock.place.last}.weight")

    @property
    def outside(self) -> Weights:
        """The weights of its norms."""
        return {name: w for name, w in self.weights.items() if not name.startswith(self.name(""))}


RIDGE = 1e-4
"""Of the least squares, relative to the mean diagonal of the Gram matrix."""


@dataclass(frozen=True)
class Context:
    """A sub-block of the parent and what was observed of it."""

    origin: Origin
    statistics: LayerStatistics
    ridge: float = RIDGE


class Variant(ABC, Generic[S]):
    """One kind of variant. Weights are named relative to the layer and have the parent's dtype."""

    def observations(self, spec: S, origin: Origin) -> dict[str, Observe]:
        """The sums over calibration tokens that `least_squares` needs; equal keys are computed once."""
        return {}

    @abstractmethod
    def paper(self, spec: S, context: Context) -> Weights:
        """The paper's initialisation (Puzzle, section 2)."""

    @abstractmethod
    def least_squares(self, spec: S, context: Context) -> dict[str, Weights]:
        """Closed-form initialisations against the parent's output, by name; the caller keeps the best one."""

    def random(self, spec: S, context: Context, generator: torch.Generator) -> Weights:
        """Matrices drawn as at the start of pretraining; vectors (norms, biases) as in the parent."""
        scale = context.origin.parent.config.initializer_range
        return {
            name: torch.randn(w.shape, generator=generator).mul_(scale).to(w) if w.ndim > 1 else w
            for name, w in self.paper(spec, context).items()
        }


class Unchanged(Variant[S]):
    """The parent's own weights."""

    def paper(self, spec, context):
        """As they are."""
        return context.origin.weights

    def least_squares(self, spec, context):
        """Nothing to solve."""
        return {"unchanged": context.origin.weights}


class Empty(Variant[S]):
    """No weights at all."""

    def paper(self, spec, context):
        """Nothing."""
        return {}

    def least_squares(self, spec, context):
        """Nothing to solve."""
        return {"no_op": {}}


def solve_ridge(moments: Moments, ridge: float) -> torch.Tensor:
    """W minimising sum w |x W' - y|^2 + ridge * mean(diag) |W|^2, as a weight of shape [outputs, inputs], float64."""
    gram, cross = moments.gram, moments.cross
    assert cross is not None
    return torch.linalg.solve(damped(gram, ridge), cross).T


def damped(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """`gram` with a ridge relative to its mean diagonal (and a floor, so that zero data stays solvable)."""
    mean = gram.diagonal().mean().clamp_min(1e-20)
    return gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def like(weight: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`weight` in the dtype and on the device of `model`."""
    return weight.to(model).contiguous()
