"""Mistral: as Llama, with one sliding window for all layers."""

from puzzle_nas.families.base import Family


class Mistral(Family):
    """No biases."""

    model_type = "mistral"

    def specifics(self, config):
        """See `Family.specifics`."""
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return {"sliding_window": config.sliding_window, "layer_types": [kind] * config.num_hidden_layers}
