"""OLMo 2: norms behind the mixers instead of in front, and on all queries and all keys together."""

from puzzle_nas.families.base import Family, Place


class Olmo2(Family):
    """A mixer reads the residual stream as it is."""

    model_type = "olmo2"
    places = {
        "attention": Place("self_attn", None, "o_proj", output_norm="post_attention_layernorm", pair=True),
        "ffn": Place("mlp", None, "down_proj", output_norm="post_feedforward_layernorm"),
    }
