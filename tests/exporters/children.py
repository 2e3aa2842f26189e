"""Small random children of every shape, with a byte-level BPE tokenizer."""

import copy
import functools
import itertools
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from puzzle_nas.architecture import Architecture
from puzzle_nas.data.sources import documents
from puzzle_nas.exporters import Child
from puzzle_nas.families import architecture_of, build, child_config
from puzzle_nas.formats.stored import put
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp

SIZES = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.1,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_ATTENTION, NO_FFN = NoOp("attention"), NoOp("ffn")
LINEAR_ATTENTION, LINEAR_FFN = Linear("attention"), Linear("ffn")
EMPTY = (NO_ATTENTION, NO_FFN)
EVERY_KIND = {
    0: [NO_ATTENTION],
    1: [GroupedAttention(2), NO_FFN],
    2: [LINEAR_ATTENTION, GatedFFN(32)],
    3: EMPTY,
    4: [GroupedAttention(1), LINEAR_FFN],
    5: [LINEAR_ATTENTION, LINEAR_FFN],
    6: [NO_ATTENTION, LINEAR_FFN],
    7: [NO_FFN],
}
CHILDREN = {
    "the parent": {},
    "every kind": EVERY_KIND,
    "empty at both ends": {0: EMPTY, 7: EMPTY, 3: [LINEAR_ATTENTION, NO_FFN]},
    "linear at both ends": {i: [LINEAR_ATTENTION, LINEAR_FFN] for i in (0, 7)},
    "no attention at all": {i: [NO_ATTENTION] for i in range(8)},
    "no FFN at all": {i: [NO_FFN] for i in range(8)},
    "nothing at all": {i: EMPTY for i in range(8)},
}
STOCK_SAFE = {
    1: [GroupedAttention(2), GatedFFN(48)],
    2: [NO_ATTENTION],
    3: EMPTY,
    4: [GroupedAttention(1), NO_FFN],
    7: [NO_FFN],
}
FAMILIES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "biases as in Qwen2": {"family": "qwen2"},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "Llama 3's rotary positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "stretched rotary positions": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 4, "query_pre_attn_scalar": 16}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
HALF_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.11180339887498949,
    "residual_multiplier": 0.22,
    "logits_scaling": 2.0,
}
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
OWN_LAYERS = {
    "qwen3": {},
    "qwen3, tied, wide heads": {"tie_word_embeddings": True, "head_dim": 32},
    "qwen3, YaRN": {"rope_parameters": YARN},
    "qwen3_moe": EXPERTS,
    "qwen3_moe, tied, wide heads, YaRN": {
        **EXPERTS,
        "tie_word_embeddings": True,
        "head_dim": 32,
        "rope_parameters": YARN,
    },
    "gemma2": {**MIXED, **CAPS},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "rope_parameters": TWO_ROPES},
    "gemma3_text, other layers, cap": {**MIXED, "rope_parameters": TWO_ROPES, "final_logit_softcapping": 3.0},
    "phi3": {"rope_parameters": HALF_ROTATED, "sliding_window": None},
    "smollm3": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "smollm3, wide heads, YaRN": {"head_dim": 32, "rope_parameters": YARN, "tie_word_embeddings": False},
    "olmo2": {"num_key_value_heads": 2},
    "olmo2, YaRN": {"rope_parameters": YARN},
    "granite": {**MULTIPLIERS, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "granite, biases, wide heads": {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
}
"""Parents, by family up to a comma, of whose layers llama.cpp serves the parent's own only."""
WITHOUT = {"smollm3": (2, 3, 5, 6)}
"""Layers that can be missing, by family: those left have rotary positions where llama.cpp gives them some."""


@functools.cache
def tokenizer(individual_digits=False):
    raw = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if individual_digits else byte_level
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = documents(SourceSettings(source="python-stdlib"), seed=0)
    raw.train_from_iterator([*(next(source) for _ in range(20)), "12345 " * 100], trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@functools.cache
def sentencepiece_tokenizer(as_normaliser):
    """As transformers converts SentencePiece's: bytes as a last resort, every split of a token a merge."""
    space, special = "▁", ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(space)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=70, show_progress=False)
    source = documents(SourceSettings(source="python-stdlib"), seed=0)
    trained.train_from_iterator([next(source) for _ in range(20)], trainer)
    learnt = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])][len(special) :]
    # SentencePiece keeps white space in rows too.
    learnt += [space * length for length in (2, 4, 8)]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in learnt for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    raw = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if as_normaliser:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def child_of(per_layer=None, family="llama", **changes):
    """A random child in which no weight is left at a value that hides its absence; `per_layer` holds specs."""
    torch.manual_seed(0)
    # Some configurations write into what they are given.
    sizes = copy.deepcopy({**SIZES, **changes})
    if family in ("qwen2", "phi3"):
        # Their heads have no size of their own.
        sizes.pop("head_dim")
    parent = AutoConfig.for_model(family, **sizes)
    architecture = architecture_of(parent)
    for layer, specs in (per_layer or {}).items():
        for spec in specs:
            if isinstance(spec, GroupedAttention):
                spec = replace(spec, window=architecture.layers[layer][spec.slot].window)
            if spec.slot not in architecture.slots:
                # A mixture in place of the FFN.
                spec = replace(spec, slot="experts")
            architecture = architecture.replaced(layer, spec)
    model = AutoModelForCausalLM.from_config(child_config(parent, architecture)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Child(model, tokenizer())


def own_layers_of(name, per_layer=None, **changes):
    """A child of one of the parents of `OWN_LAYERS`."""
    return child_of(per_layer, name.split(",")[0], **OWN_LAYERS[name] | changes)


def without_layers(name):
    """A child of one of `OWN_LAYERS` that lacks some of the layers."""
    return own_layers_of(name, dict.fromkeys(WITHOUT.get(name.split(",")[0], (0, 3, 7)), EMPTY))


def in_formats(child, forms):
    """The child with its sub-blocks in these formats (None: in none) in turn, rounded to nearest."""
    forms = itertools.cycle(forms)
    layers = (
        {s: spec if spec.empty else spec.stored(next(forms)) for s, spec in b.items()}
        for b in child.architecture.layers
    )
    config = child_config(child.config, Architecture(tuple(layers)))
    model = build(config, child.model.state_dict())
    matrices = {name: Child(model, None).matrix(name) for name in Child(model, None).forms}
    put(model, matrices)
    return Child(model, child.tokenizer, matrices=matrices)
