"""Granite 3 and 4 (dense): as Llama, with multipliers."""

from dataclasses import replace

from puzzle_nas.families.base import ATTENTION, FFN, Family


class Granite(Family):
    """Embeddings, attention scores, what a mixer adds, and logits are multiplied."""

    model_type = "granite"
    places = {
        "attention": replace(ATTENTION, scale="residual_multiplier"),
        "ffn": replace(FFN, scale="residual_multiplier"),
    }
    embedding_scale = "embedding_multiplier"
    logit_scale = "logits_scaling"
