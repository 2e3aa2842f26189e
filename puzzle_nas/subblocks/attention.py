"""Variants of attention: fewer key-value heads, one matrix, nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from puzzle_nas.architecture import GroupedAttention, LinearAttention, NoOpAttention
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.subblocks.base import Empty, LayerContext, Variant, like, norm_of, solve_ridge
from puzzle_nas.subblocks.layers import Weights, subblock_layer, subblock_weights
from puzzle_nas.subblocks.statistics import Activations, Moments, inverse_norm, moments


def grouped_weights(
    spec: GroupedAttention, layer: PuzzleDecoderLayer, merge: Callable[[torch.Tensor], torch.Tensor]
) -> Weights:
    """The parent's attention with fewer keys and values.

    `merge` makes one head of each group of neighbours: [groups, heads in a group, ...] -> [groups, ...].
    """
    groups, head_dim = spec.num_key_value_heads, layer.self_attn.head_dim
    weights = subblock_weights(layer, "attention")
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            rest = weight.shape[1:]
            merged = merge(weight.float().view(groups, -1, head_dim, *rest))
            weights[name] = merged.reshape(groups * head_dim, *rest).to(weight)
    return weights


class Grouped(Variant[GroupedAttention]):
    """Softmax attention with fewer KV heads.

    The paper pools the keys and values of a group. Keys of different heads point in unrelated directions, so least
    squares keeps one head of each group as it is, and refits the output projection to it; held-back KL says which.
    """

    spec_class = GroupedAttention

    def observations(self, spec, layer):
        """What the output projection receives when one head of each group is kept, against the parent's output."""

        def observer(weights: Weights) -> Callable[[Activations], Moments]:
            grouped = subblock_layer(layer.self_attn.config, layer.layer_type, spec, weights)

            def observe(batch: Activations) -> Moments:
                context_BTE = grouped.self_attn.context(batch.attention_in_BTD, **batch.inputs)[0]
                target = batch.attention_out_ND
                if layer.self_attn.o_proj.bias is not None:
                    target = target - layer.self_attn.o_proj.bias
                return moments(context_BTE.flatten(0, 1), target, inverse_norm(batch.attention_out_ND))

            return observe

        return {f"{spec.id}.{name}": observer(weights) for name, weights in self._kept_heads(spec, layer).items()}

    def paper(self, spec, context):
        """Mean-pooled keys and values."""
        return grouped_weights(spec, context.layer, lambda heads: heads.mean(dim=1))

    def least_squares(self, spec, context):
        """Each head of a group kept, with the output projection that fits it best."""
        name = "self_attn.o_proj.weight"
        candidates = {}
        for choice, weights in self._kept_heads(spec, context.layer).items():
            output = solve_ridge(context.statistics[f"{spec.id}.{choice}"], context.ridge)
            candidates[choice] = {**weights, name: like(output, weights[name])}
        return candidates

    @staticmethod
    def _kept_heads(spec: GroupedAttention, layer: PuzzleDecoderLayer) -> dict[str, Weights]:
        group_size = layer.self_attn.config.num_key_value_heads // spec.num_key_value_heads
        return {
            f"head_{kept}": grouped_weights(spec, layer, lambda heads, kept=kept: heads[:, kept])
            for kept in range(group_size)
        }

    def kv_bytes_per_token(self, spec, config, itemsize):
        """Keys and values of every KV head."""
        return 2 * spec.num_key_value_heads * config.head_dim * itemsize


class Linear(Variant[LinearAttention]):
    """One matrix."""

    spec_class = LinearAttention

    def observations(self, spec, layer):
        """The norm's output against the parent's attention output."""
        return {spec.id: lambda batch: moments(batch.attention_in_ND, batch.attention_out_ND)}

    def paper(self, spec, context):
        """W_O W_V, as if each token attended only to itself; V heads repeated for grouped queries."""
        attention = context.layer.self_attn
        assert attention is not None
        value = attention.v_proj.weight.float().view(-1, attention.head_dim, context.config.hidden_size)
        value = value.repeat_interleave(attention.num_key_value_groups, dim=0).flatten(0, 1)
        return self._weights(attention.o_proj.weight.float() @ value, context)

    def least_squares(self, spec, context):
        """The matrix nearest to the parent's attention on calibration text."""
        return {"linear": self._weights(solve_ridge(context.statistics[spec.id], context.ridge), context)}

    @staticmethod
    def _weights(matrix: torch.Tensor, context: LayerContext) -> Weights:
        norm = norm_of(context, "attention")
        return {**norm, "self_attn.linear_attn.weight": like(matrix, next(iter(norm.values())))}


class NoOp(Empty[NoOpAttention]):
    """Nothing."""

    spec_class = NoOpAttention
