"""Many rows written token by token: attention of one token each, and a cache that is not copied at every step.

The fused attention kernels of CPUs are made for prompts, and a cache that grows by concatenation moves all of itself at
every step (docs/results.md).
"""

# B rows, H query heads, K key-value heads, G = H / K, T cached tokens, C head_dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel

ATTENTION = "puzzle_one_token"


@contextmanager
def decoding(model: PreTrainedModel, length: int) -> Iterator[Cache]:
    """An empty cache with room for `length` tokens of each row. Inside, the model takes one token of each row a call.

    Rows are of one length: there is no mask.
    """
    cache = DynamicCache(config=model.config)
    attention = model.config._attn_implementation
    assert attention is not None
    cache.layers = [_Room(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    model.set_attn_implementation(ATTENTION)
    try:
        yield cache
    finally:
        model.set_attn_implementation(attention)


class _Room(DynamicLayer):
    """Keys and values of one layer, written into memory for all tokens that are to come."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, key_states, value_states, *_, **__):
        """Shapes: [B, K, 1, C] each; returns all so far, [B, K, T, C]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            B, K, _, C = key_states.shape
            self.room = [key_states.new_empty(B, K, self.length, C) for _ in range(2)]
        end = self.get_seq_length() + 1
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, end - 1 : end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def _attend(module: nn.Module, query, key, value, attention_mask, scaling: float, **_):
    """Shapes: query [B, H, 1, C], key and value [B, K, T, C]; returns [B, 1, H, C]."""
    B, H, _, C = query.shape
    q_BKGC = query.view(B, key.shape[1], -1, C)
    weights_BKGT = ((q_BKGC @ key.transpose(-1, -2)).float() * scaling).softmax(-1)
    return (weights_BKGT.to(value.dtype) @ value).reshape(B, 1, H, C), None


AttentionInterface.register(ATTENTION, _attend)
