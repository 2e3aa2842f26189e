"""Qwen3: norms on queries and keys, sliding windows by layer."""

from puzzle_nas.families.base import Family


class Qwen3(Family):
    """Optional attention biases; head_dim is free of hidden_size / heads."""

    model_type = "qwen3"

    def specifics(self, config):
        """See `Family.specifics`."""
        return {
            "query_key_norm": True,
            "query_key_value_bias": config.attention_bias,
            "attention_output_bias": config.attention_bias,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }
