"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from puzzle_nas.families.base import Family


class Qwen2(Family):
    """Sliding windows by layer."""

    model_type = "qwen2"

    def specifics(self, config):
        """See `Family.specifics`."""
        return {
            "query_key_value_bias": True,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }
