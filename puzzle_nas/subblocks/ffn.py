"""Variants of the FFN: fewer channels."""

from __future__ import annotations

import torch

from puzzle_nas.specs import GatedFFN
from puzzle_nas.subblocks.base import Origin, Variant, damped, like, solve_ridge
from puzzle_nas.subblocks.layers import Weights
from puzzle_nas.subblocks.statistics import Activations, Moments, inverse_norm, moments

REMOVED_TOGETHER = 32
"""Channels removed between two updates of the inverse Gram matrix."""
FUSED = "gate_up_proj"
"""Some families keep the rows of gate and up projection in one matrix."""
UP = ("up_proj", "w3")
ROWS = ("gate_proj", "w1", *UP)
"""What families call them."""


def channel_contribution(mean_abs_F: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """C_i = mean |x_i| * |W_down[:, i]|_2 (Puzzle, section 2), [F]."""
    return mean_abs_F * down_DF.double().norm(dim=0)


def removal_order(gram_FF: torch.Tensor, down_DF: torch.Tensor, ridge: float) -> torch.Tensor:
    """Channels from the most to the least worth keeping, [F].

    Backward elimination in the manner of Optimal Brain Surgeon (Hassibi and Stork, 1993): removing channel i, with
    the other columns of the down projection re-solved, costs |W_i|^2 / (G^-1)_ii. The cheapest channels go first,
    `REMOVED_TOGETHER` at a time, and W and G^-1 are updated in between.
    """
    inverse = torch.linalg.inv(damped(gram_FF, ridge)).float()
    down = down_DF.float()
    alive = torch.arange(len(gram_FF), device=gram_FF.device)
    removed: list[torch.Tensor] = []
    while len(alive) > REMOVED_TOGETHER:
        cost = down.square().sum(0) / inverse.diagonal()
        order = cost.argsort(stable=True)
        worst, kept = order[:REMOVED_TOGETHER], order[REMOVED_TOGETHER:].sort().values
        update = torch.linalg.solve(inverse[worst][:, worst], inverse[worst][:, kept])
        down = down[:, kept] - down[:, worst] @ update
        inverse = inverse[kept][:, kept] - inverse[kept][:, worst] @ update
        removed.append(alive[worst])
        alive = alive[kept]
    return torch.cat([alive, *reversed([chunk.flip(0) for chunk in removed])])


def kept_channels(origin: Origin, channels: torch.Tensor) -> Weights:
    """The parent's FFN with some of its channels, [kept] of their numbers."""
    weights = origin.weights
    for name, weight in weights.items():
        part = name.removeprefix(origin.name("")).split(".")[0]
        if part in ROWS:
            weights[name] = weight[channels].contiguous()
        elif part == FUSED:
            weights[name] = torch.cat([half[channels] for half in weight.chunk(2)])
        elif name == origin.last_name:
            weights[name] = weight[:, channels].contiguous()
    return weights


def up_rows(origin: Origin) -> torch.Tensor:
    """The up projection, [F, D]."""
    mlp = origin.mixer
    if hasattr(mlp, FUSED):
        return getattr(mlp, FUSED).weight.chunk(2)[1]
    return next(getattr(mlp, name).weight for name in UP if hasattr(mlp, name))


class Gated(Variant[GatedFFN]):
    """A gated FFN of fewer channels; least squares chooses them and refits the down projection to them."""

    def observations(self, spec, origin):
        """The channels' Gram matrix, and their mean magnitudes."""

        def gram(batch: Activations) -> Moments:
            assert batch.last_input_NI is not None
            return moments(batch.last_input_NI, weights_N=inverse_norm(batch.mixed_ND))

        def magnitude(batch: Activations) -> Moments:
            assert batch.last_input_NI is not None
            return Moments(batch.last_input_NI.float().abs().sum(0).double())

        return {"channels": gram, "magnitude": magnitude}

    def paper(self, spec, context):
        """The channels of highest Channel Contribution."""
        down = context.origin.weights[context.origin.last_name]
        contribution = channel_contribution(context.statistics["magnitude"].gram, down)
        return kept_channels(
            context.origin, contribution.argsort(descending=True, stable=True)[: spec.intermediate_size]
        )

    def least_squares(self, spec, context):
        """Channels by backward elimination, and the down projection that makes the best of them."""
        statistics, origin = context.statistics, context.origin
        gram, down = statistics["channels"].gram, origin.weights[origin.last_name].double()
        if "order" not in statistics:
            # One elimination serves every width of the layer.
            statistics["order"] = Moments(removal_order(gram, down, context.ridge))
        kept = statistics["order"].gram[: spec.intermediate_size]
        solved = solve_ridge(Moments(gram[kept][:, kept], gram[kept] @ down.T), context.ridge)
        weights = kept_channels(origin, kept)
        return {"channels": {**weights, origin.last_name: like(solved, weights[origin.last_name])}}
