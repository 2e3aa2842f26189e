"""GLM-4-0414: as GLM, with a norm behind each mixer too."""

from puzzle_nas.families.base import Family, Place


class Glm4(Family):
    """Four norms, by names of its own."""

    model_type = "glm4"
    places = {
        "attention": Place("self_attn", "input_layernorm", "o_proj", output_norm="post_self_attn_layernorm", pair=True),
        "ffn": Place("mlp", "post_attention_layernorm", "down_proj", output_norm="post_mlp_layernorm"),
    }
