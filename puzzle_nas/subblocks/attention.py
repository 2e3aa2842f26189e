"""Variants of softmax attention: fewer key-value heads, a window."""

from __future__ import annotations

from collections.abc import Callable

import torch

from puzzle_nas.specs import GroupedAttention, WindowAttention
from puzzle_nas.subblocks.base import Origin, Unchanged, Variant, like, solve_ridge
from puzzle_nas.subblocks.layers import Weights, made_subblock
from puzzle_nas.subblocks.statistics import Activations, Moments, inverse_norm, moments

FUSED = "qkv_proj"
"""Some families keep the rows of queries, keys and values in one matrix."""


def merged_heads(origin: Origin, groups: int, merge: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
    """The parent's attention with fewer keys and values.

    Args:
        groups: how many KV heads are left.
        merge: makes one head of each group of neighbours: [groups, heads in a group, ...] -> [groups, ...].
    """
    config, head_dim = origin.parent.config, origin.mixer.head_dim
    rows = config.num_key_value_heads * head_dim

    def merged(weight: torch.Tensor) -> torch.Tensor:
        heads = merge(weight.float().view(groups, -1, head_dim, *weight.shape[1:]))
        return heads.reshape(groups * head_dim, *weight.shape[1:]).to(weight)

    weights = origin.weights
    for name, weight in weights.items():
        part = name.removeprefix(origin.name("")).split(".")[0]
        if part == FUSED:
            queries, keys, values = weight.split([len(weight) - 2 * rows, rows, rows])
            weights[name] = torch.cat([queries, merged(keys), merged(values)])
        elif part in ("k_proj", "v_proj") or (part == "k_norm" and len(weight) == rows):
            weights[name] = merged(weight)
    return weights


def value_rows(origin: Origin) -> torch.Tensor:
    """The value projection, [KV heads * head_dim, D]."""
    attention = origin.mixer
    if hasattr(attention, FUSED):
        rows = origin.parent.config.num_key_value_heads * attention.head_dim
        return getattr(attention, FUSED).weight[-rows:]
    return attention.v_proj.weight


class Grouped(Variant[GroupedAttention]):
    """Softmax attention with fewer KV heads.

    The paper pools the keys and values of a group. Keys of different heads point in unrelated directions, so least
    squares keeps one head of each group as it is, and refits the output projection to it; held-back KL says which.
    """

    def observations(self, spec, origin):
        """What the output projection receives when one head of each group is kept, against the parent's output."""

        def observer(weights: Weights) -> Callable[[Activations], Moments]:
            grouped = made_subblock(origin.parent, origin.layer, spec, weights)
            bias = origin.weights.get(origin.last_name.replace(".weight", ".bias"))

            def observe(batch: Activations) -> Moments:
                received = grouped.with_last_input(batch.read_BTD, batch.inputs)[1]
                target = batch.mixed_ND if bias is None else batch.mixed_ND - bias
                return moments(received.flatten(0, 1), target, inverse_norm(batch.mixed_ND))

            return observe

        return {f"{spec.id}.{name}": observer(weights) for name, weights in self._kept_heads(spec, origin).items()}

    def paper(self, spec, context):
        """Mean-pooled keys and values."""
        return merged_heads(context.origin, spec.num_key_value_heads, lambda heads: heads.mean(dim=1))

    def least_squares(self, spec, context):
        """Each head of a group kept, with the output projection that fits it best."""
        name = context.origin.last_name
        candidates = {}
        for choice, weights in self._kept_heads(spec, context.origin).items():
            output = solve_ridge(context.statistics[f"{spec.id}.{choice}"], context.ridge)
            candidates[choice] = {**weights, name: like(output, weights[name])}
        return candidates

    @staticmethod
    def _kept_heads(spec: GroupedAttention, origin: Origin) -> dict[str, Weights]:
        group_size = origin.parent.config.num_key_value_heads // spec.num_key_value_heads
        return {
            f"head_{kept}": merged_heads(origin, spec.num_key_value_heads, lambda heads, kept=kept: heads[:, kept])
            for kept in range(group_size)
        }


class Window(Unchanged[WindowAttention]):
    """The parent's attention; what changes is what it sees."""
