"""Gemma 2: a norm behind each mixer too, soft-capped logits, windows in every other layer."""

from puzzle_nas.families.base import Family, Place


class Gemma2(Family):
    """Norms by another name in front of the FFN; the embedding module scales by itself."""

    model_type = "gemma2"
    places = {
        "attention": Place("self_attn", "input_layernorm", "o_proj", output_norm="post_attention_layernorm", pair=True),
        "ffn": Place("mlp", "pre_feedforward_layernorm", "down_proj", output_norm="post_feedforward_layernorm"),
    }
    logit_cap = "final_logit_softcapping"
