"""Tiny random parents: several of every family in the registry, with nothing at its neutral value."""

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_nas.families import FAMILIES

WINDOW = 5
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}
LONG_ROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
WIDE_HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FEW_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "intermediate_size": 40,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONVOLUTIONS = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "intermediate_size": 60,
    "block_multiple_of": 8,
}
ONE_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
PARENTS = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied, wide heads": {**TIED, **WIDE_HEADS},
    "llama, Llama 3's rotary positions": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": WINDOW, **WIDE_HEADS},
    "qwen2": {},
    "qwen2, windows in some layers": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3, tied": {**WIDE_HEADS, **TIED},
    "qwen3, biases": {**WIDE_HEADS, "attention_bias": True},
    "gemma2": {**WIDE_HEADS, **MIXED, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**WIDE_HEADS, **MIXED, "rope_parameters": TWO_ROPES, "query_pre_attn_scalar": 9},
    "gemma3_text, soft cap, untied": {**WIDE_HEADS, **MIXED, "final_logit_softcapping": 3.0, **UNTIED},
    "smollm3": {"no_rope_layers": [0, 1, 1]},
    "smollm3, windows": {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
    "olmo2": {},
    "olmo3": {**MIXED, "rope_parameters": TWO_ROPES},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "phi3, window": {"sliding_window": WINDOW},
    "granite": MULTIPLIERS,
    "granite, biases, tied": {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, **TIED},
    "ministral": {**WIDE_HEADS, **MIXED},
    "ministral3": {**WIDE_HEADS, "rope_parameters": YARN},
    "ministral3, window": {**WIDE_HEADS, "rope_parameters": YARN, "sliding_window": WINDOW},
    "glm": WIDE_HEADS | {"attention_bias": True},
    "glm4": WIDE_HEADS | {"attention_bias": True},
    "qwen3_moe": {**WIDE_HEADS, **EXPERTS, "norm_topk_prob": True},
    "qwen3_moe, dense first layer": {**WIDE_HEADS, **EXPERTS, "mlp_only_layers": [0]},
    "mixtral": {**WIDE_HEADS, **FEW_EXPERTS},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
    "gpt_oss": {**WIDE_HEADS, **FEW_EXPERTS, **MIXED, **ONE_ROPE},
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [3]},
    "qwen3_5_text": DELTA,
    "lfm2": CONVOLUTIONS,
}
"""By family (up to a comma), what is not as in `SIZES`."""


def config_of(name):
    """The configuration of a parent of `PARENTS`."""
    return AutoConfig.for_model(name.split(",")[0], **copy.deepcopy({**SIZES, **PARENTS[name]}))


@functools.cache
def parent_of(name):
    """A parent of `PARENTS`. Tests must not change it."""
    return random_parent(config_of(name))


NOT_AS_AT_THE_START = ("bias", "norm", "sinks", "router", "mlp.gate.weight")


def random_parent(config):
    """A model whose routers decide, and whose biases, norms and sinks are not as at the start of training.

    Biases begin at zero and norms at one: a family that dropped them would pass unnoticed.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if any(part in name for part in NOT_AS_AT_THE_START):
            weight.add_(0.3 * torch.randn_like(weight))
    return model


assert {name.split(",")[0] for name in PARENTS} == set(FAMILIES), "every family needs a parent here"
