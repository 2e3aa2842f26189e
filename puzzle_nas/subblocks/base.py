"""What every kind of variant can do: start from the parent in three ways, and count its KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from puzzle_nas.architecture import Spec
from puzzle_nas.modeling import PuzzleConfig
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.subblocks.layers import PREFIXES, Weights
from puzzle_nas.subblocks.statistics import Activations, LayerStatistics, Moments

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class LayerContext:
    """A parent layer and what was observed of it."""

    config: PuzzleConfig
    layer: PuzzleDecoderLayer
    statistics: LayerStatistics
    ridge: float


class Variant(ABC, Generic[S]):
    """One kind of variant. Weights are named relative to the layer and have the parent's dtype."""

    spec_class: ClassVar[type[Spec]]

    def observations(self, spec: S, layer: PuzzleDecoderLayer) -> dict[str, Callable[[Activations], Moments]]:
        """The sums over calibration tokens that `least_squares` needs; equal keys are computed once."""
        return {}

    @abstractmethod
    def paper(self, spec: S, context: LayerContext) -> Weights:
        """The paper's initialisation (Puzzle, section 2)."""

    @abstractmethod
    def least_squares(self, spec: S, context: LayerContext) -> dict[str, Weights]:
        """Closed-form initialisations against the parent's output, by name; the caller keeps the best one."""

    def random(self, spec: S, context: LayerContext, generator: torch.Generator) -> Weights:
        """Matrices drawn as at the start of pretraining; vectors (norms, biases) as in the parent."""
        return {
            name: torch.randn(w.shape, generator=generator).mul_(context.config.initializer_range).to(w)
            if w.ndim > 1
            else w
            for name, w in self.paper(spec, context).items()
        }

    def kv_bytes_per_token(self, spec: S, config: PuzzleConfig, itemsize: int) -> int:
        """Bytes of KV cache that one token of one sequence takes in this layer."""
        return 0


class Empty(Variant[S]):
    """No weights at all."""

    def paper(self, spec, context):
        """Nothing."""
        return {}

    def least_squares(self, spec, context):
        """Nothing to solve."""
        return {"no_op": {}}


def norm_of(context: LayerContext, slot: str) -> Weights:
    """The parent's norm in front of a slot."""
    prefix = PREFIXES[slot][1]
    return {name: w.detach() for name, w in context.layer.state_dict().items() if name.startswith(prefix)}


def solve_ridge(moments: Moments, ridge: float) -> torch.Tensor:
    """W minimising sum w |x W' - y|^2 + ridge * mean(diag) |W|^2, as a weight of shape [outputs, inputs], float64."""
    gram, cross = moments.gram, moments.cross
    assert cross is not None
    return torch.linalg.solve(damped(gram, ridge), cross).T


def damped(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """`gram` with a ridge relative to its mean diagonal (and a floor, so that zero data stays solvable)."""
    mean = gram.diagonal().mean().clamp_min(1e-20)
    return gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def like(weight: torch.Tensor, model: Any) -> torch.Tensor:
    """`weight` in the dtype and on the device of `model`."""
    return weight.to(model).contiguous()
