"""One matrix in place of a mixer, or nothing."""

from __future__ import annotations

import torch

from puzzle_nas.errors import RecipeError
from puzzle_nas.specs import Linear, NoOp
from puzzle_nas.subblocks.attention import value_rows
from puzzle_nas.subblocks.base import Context, Empty, Origin, Variant, like, solve_ridge
from puzzle_nas.subblocks.ffn import up_rows
from puzzle_nas.subblocks.layers import Weights
from puzzle_nas.subblocks.statistics import inverse_norm, moments

TOKEN_WEIGHTS = {
    "by_output": lambda batch: inverse_norm(batch.mixed_ND),
    "by_output_squared": lambda batch: inverse_norm(batch.mixed_ND, 2),
    "by_block_output": lambda batch: inverse_norm(batch.block_output_ND),
}
"""Where a few tokens carry massive activations, no single weighting of tokens is right in every layer."""
PLAIN = {"linear": lambda batch: None}
"""Attention has no such tokens."""


class LinearVariant(Variant[Linear]):
    """One matrix."""

    def weightings(self, spec: Linear) -> dict:
        """How tokens may be weighted in the fit, by name."""
        return PLAIN if spec.slot == "attention" else TOKEN_WEIGHTS

    def observations(self, spec, origin):
        """What the mixer reads against its output, under each weighting of tokens."""
        return {
            f"{spec.id}.{name}": lambda batch, weigh=weigh: moments(batch.read_ND, batch.mixed_ND, weigh(batch))
            for name, weigh in self.weightings(spec).items()
        }

    def paper(self, spec, context):
        """Attention as W_O W_V, as if each token attended only to itself; a gated FFN as W_down W_up."""
        product = PAPERS_PRODUCTS.get(spec.slot)
        if product is None:
            raise RecipeError(f"The paper starts {spec.id} from nothing; set library.initialisation to least_squares.")
        return self._weights(product(context.origin), context)

    def least_squares(self, spec, context):
        """The matrix nearest to the parent's mixer on calibration text, under each weighting."""
        return {
            name: self._weights(solve_ridge(context.statistics[f"{spec.id}.{name}"], context.ridge), context)
            for name in self.weightings(spec)
        }

    @staticmethod
    def _weights(matrix: torch.Tensor, context: Context) -> Weights:
        origin = context.origin
        example = next(iter(origin.weights.values()))
        return {**origin.outside, origin.name("linear.weight"): like(matrix, example)}


def _output_times_value(origin: Origin) -> torch.Tensor:
    attention, last = origin.mixer, origin.subblock.last
    assert last is not None
    value = value_rows(origin).float().view(-1, attention.head_dim, origin.parent.config.hidden_size)
    repeats = last.weight.shape[1] // (len(value) * attention.head_dim)
    return last.weight.float() @ value.repeat_interleave(repeats, dim=0).flatten(0, 1)


def _down_times_up(origin: Origin) -> torch.Tensor:
    last = origin.subblock.last
    assert last is not None
    return last.weight.float() @ up_rows(origin).float()


PAPERS_PRODUCTS = {"attention": _output_times_value, "ffn": _down_times_up}


class NoOpVariant(Empty[NoOp]):
    """Nothing."""
