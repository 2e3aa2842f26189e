"""Llama 1 to 3, SmolLM2 and everything else that loads as `LlamaForCausalLM`."""

from puzzle_nas.families.base import Family


class Llama(Family):
    """Optional biases, no sliding window."""

    model_type = "llama"

    def specifics(self, config):
        """See `Family.specifics`."""
        return {
            "query_key_value_bias": config.attention_bias,
            "attention_output_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
        }
