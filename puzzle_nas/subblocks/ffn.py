"""Variants of the FFN: fewer channels, one matrix, nothing."""

from __future__ import annotations

import torch

from puzzle_nas.architecture import GatedFFN, LinearFFN, NoOpFFN
from puzzle_nas.subblocks.base import Empty, LayerContext, Variant, damped, like, norm_of, solve_ridge
from puzzle_nas.subblocks.layers import Weights, subblock_weights
from puzzle_nas.subblocks.statistics import Activations, Moments, inverse_norm, moments

REMOVED_TOGETHER = 32
"""Channels removed between two updates of the inverse Gram matrix."""


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


class Gated(Variant[GatedFFN]):
    """A gated FFN of fewer channels; least squares chooses them and refits the down projection to them."""

    spec_class = GatedFFN

    def observations(self, spec, layer):
        """The channels' Gram matrix, and their mean magnitudes."""

        def gram(batch: Activations) -> Moments:
            return moments(batch.channels_NF, weights_N=inverse_norm(batch.ffn_out_ND))

        def magnitude(batch: Activations) -> Moments:
            return Moments(batch.channels_NF.float().abs().sum(0).double())

        return {"ffn.channels": gram, "ffn.magnitude": magnitude}

    def paper(self, spec, context):
        """The channels of highest Channel Contribution."""
        weights = subblock_weights(context.layer, "ffn")
        contribution = channel_contribution(context.statistics["ffn.magnitude"].gram, weights["mlp.down_proj.weight"])
        return self._keep(contribution.argsort(descending=True, stable=True)[: spec.intermediate_size], weights)

    def least_squares(self, spec, context):
        """Channels by backward elimination, and the down projection that makes the best of them."""
        statistics = context.statistics
        weights = subblock_weights(context.layer, "ffn")
        gram, down = statistics["ffn.channels"].gram, weights["mlp.down_proj.weight"].double()
        if "ffn.order" not in statistics:
            # One elimination serves every width of the layer.
            statistics["ffn.order"] = Moments(removal_order(gram, down, context.ridge))
        kept = statistics["ffn.order"].gram[: spec.intermediate_size]
        solved = solve_ridge(Moments(gram[kept][:, kept], gram[kept] @ down.T), context.ridge)
        name = "mlp.down_proj.weight"
        return {"channels": {**self._keep(kept, weights), name: like(solved, weights[name])}}

    @staticmethod
    def _keep(channels: torch.Tensor, weights: Weights) -> Weights:
        kept = dict(weights)
        for name, weight in weights.items():
            if ".gate_proj." in name or ".up_proj." in name:
                kept[name] = weight[channels].contiguous()
            elif name.endswith("down_proj.weight"):
                kept[name] = weight[:, channels].contiguous()
        return kept


TOKEN_WEIGHTS = {
    "by_output": lambda batch: inverse_norm(batch.ffn_out_ND),
    "by_output_squared": lambda batch: inverse_norm(batch.ffn_out_ND, 2),
    "by_block_output": lambda batch: inverse_norm(batch.out_ND),
}
"""Where a few tokens carry massive activations, no single weighting of tokens is right in every layer."""


class Linear(Variant[LinearFFN]):
    """One matrix."""

    spec_class = LinearFFN

    def observations(self, spec, layer):
        """The norm's output against the parent's FFN output, under each weighting of tokens."""
        return {
            f"{spec.id}.{name}": lambda batch, weigh=weigh: moments(batch.ffn_in_ND, batch.ffn_out_ND, weigh(batch))
            for name, weigh in TOKEN_WEIGHTS.items()
        }

    def paper(self, spec, context):
        """W_down W_up, ignoring the gate."""
        mlp = context.layer.mlp
        assert mlp is not None
        return self._weights(mlp.down_proj.weight.float() @ mlp.up_proj.weight.float(), context)

    def least_squares(self, spec, context):
        """The matrix nearest to the parent's FFN on calibration text, under each weighting."""
        return {
            name: self._weights(solve_ridge(context.statistics[f"{spec.id}.{name}"], context.ridge), context)
            for name in TOKEN_WEIGHTS
        }

    @staticmethod
    def _weights(matrix: torch.Tensor, context: LayerContext) -> Weights:
        norm = norm_of(context, "ffn")
        return {**norm, "mlp.linear_mlp.weight": like(matrix, next(iter(norm.values())))}


class NoOp(Empty[NoOpFFN]):
    """Nothing."""

    spec_class = NoOpFFN
