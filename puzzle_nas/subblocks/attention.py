"""Variants of attention: fewer key-value heads, one matrix, nothing."""

from __future__ import annotations

import torch

from puzzle_nas.architecture import GroupedAttention, LinearAttention, NoOpAttention
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.subblocks.base import Empty, LayerContext, Variant, like, norm_of, solve_ridge
from puzzle_nas.subblocks.layers import Weights, subblock_layer, subblock_weights
from puzzle_nas.subblocks.statistics import Activations, Moments, moments


def merge_heads(weight: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Mean-pool neighbouring KV heads down to `heads` (Puzzle, section 2). Shape [K * C, ...] -> [heads * C, ...]."""
    split = weight.float().view(heads, -1, head_dim, *weight.shape[1:])
    return split.mean(dim=1).reshape(heads * head_dim, *weight.shape[1:]).to(weight)


def merged_weights(spec: GroupedAttention, layer: PuzzleDecoderLayer) -> Weights:
    """The parent's attention with pooled keys and values."""
    head_dim = layer.self_attn.head_dim
    weights = subblock_weights(layer, "attention")
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            weights[name] = merge_heads(weight, spec.num_key_value_heads, head_dim)
    return weights


class Grouped(Variant[GroupedAttention]):
    """Softmax attention with fewer KV heads; least squares refits the output projection to the merged heads."""

    spec_class = GroupedAttention

    def observations(self, spec, layer):
        """What the output projection receives when the heads are merged, against the parent's attention output."""
        merged = subblock_layer(layer.self_attn.config, layer.layer_type, spec, merged_weights(spec, layer))

        def observe(batch: Activations) -> Moments:
            context_BTE = merged.self_attn.context(batch.attention_in_BTD, **batch.inputs)[0]
            target = batch.attention_out_ND
            if layer.self_attn.o_proj.bias is not None:
                target = target - layer.self_attn.o_proj.bias
            return moments(context_BTE.flatten(0, 1), target)

        return {spec.id: observe}

    def paper(self, spec, context):
        """Mean-pooled keys and values."""
        return merged_weights(spec, context.layer)

    def least_squares(self, spec, context):
        """Mean-pooled keys and values, and the output projection that fits them best."""
        weights = merged_weights(spec, context.layer)
        output = solve_ridge(context.statistics[spec.id], context.ridge)
        name = "self_attn.o_proj.weight"
        return {"output": {**weights, name: like(output, weights[name])}}

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
