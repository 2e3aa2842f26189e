"""Which sizes of a child tensor parallelism can divide. No torch, so that one asks before an engine starts."""

from __future__ import annotations

from transformers import PreTrainedConfig


def obstacle(config: PreTrainedConfig, size: int) -> str | None:
    """Why `size` processes cannot share a `PuzzleConfig`'s layers, or None if they can.

    KV heads may also be fewer than the processes: then each is kept by several of them.
    """
    for layer, block in enumerate(config.per_layer_config):
        skip = getattr(block, "skip", [])
        if "attention" not in skip and not block.attention_linear:
            kv_heads = block.num_key_value_heads
            if block.num_attention_heads % size:
                return f"Tensor parallelism of {size} does not divide the {block.num_attention_heads} query heads."
            if kv_heads % size and size % kv_heads:
                return f"Tensor parallelism of {size} does not fit the {kv_heads} KV heads of layer {layer}."
        if "mlp" not in skip and not block.mlp_linear and block.intermediate_size % size:
            return f"Tensor parallelism of {size} does not divide the FFN width {block.intermediate_size} of layer {layer}."
    if config.hidden_size % size:
        return f"Tensor parallelism of {size} does not divide the hidden size {config.hidden_size}."
    return None
