"""The configuration that a GGUF file's fields describe, in transformers' words.

transformers' own reading drops rope scaling, windows, caps, biases and head sizes. Here every field of the file is
read, or known to change nothing, or refused by name.

Source: llama.cpp, src/llama-model.cpp (what it takes each field to mean) and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.integrations.gguf import get_gguf_config

from puzzle_nas.parents.gguf_file import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, VOCABULARY, GGUFFile
from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line, problem

Fields = dict[str, Any]
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Fields that every architecture has, and transformers' names of them."""
READ = frozenset(
    {
        *SIZES,
        *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length"),
        *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        # Said for people.
        *("rope.scaling.finetuned", "tensor_data_layout"),
    }
)
"""Fields that are accounted for, whatever the architecture."""
IDLE = {
    "attention.sliding_window": 0,
    "attention.scale": 0.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "use_parallel_residual": False,
}
"""Fields that change what is computed, and the value at which they do not."""


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture that transformers loads, and that we have a family for."""

    model_type: str
    fields: Callable[[GGUFFile, Fields], Fields]
    """What the configuration says besides, or instead of, what every file gives."""
    reads: frozenset[str] = field(default_factory=frozenset)
    """Fields of the file besides `READ`."""


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """The configuration of transformers' class, rope scaling, biases and head sizes included.

    Raises:
        CheckpointError: the architecture is not read by transformers, or a field of the file is not.
    """
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        names = ", ".join(ARCHITECTURES)
        raise problem("GGUF architecture", file=file.path, architecture=file.architecture, known=names)
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{file.architecture}.")
        if name != key and name not in READ | known.reads and (name not in IDLE or value != IDLE[name]):
            raise problem("GGUF field", file=file.path, key=key, value=value)
    try:
        fields = known.fields(file, _every(file))
        return CONFIG_MAPPING[known.model_type](**fields)
    except LIBRARY_ERRORS as error:
        raise problem("contradiction", where=file.path, reason=first_line(error, 300)) from error


def _every(file: GGUFFile) -> Fields:
    """What every file gives."""
    fields = {name: file.get(key) for key, name in SIZES.items() if file.get(key) is not None}
    fields["vocab_size"] = file.get("vocab_size") or len(file.metadata.get(VOCABULARY[0], ()))
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    for name in ("bos", "eos", "padding"):
        if (index := file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            fields[f"{name.removesuffix('ding')}_token_id"] = index
    if "rms_norm_eps" in fields:
        fields["rms_norm_eps"] = as_written(fields["rms_norm_eps"])
    return fields


def as_written(value: float) -> float:
    """A number that GGUF keeps as a float32, in the fewest digits that say which: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _head_dim(file: GGUFFile, part: float = 1.0) -> int:
    """Numbers in one head, of which a `part` is rotated.

    Raises:
        CheckpointError: heads differ by layer, or keys differ from values.
    """
    heads, width = file.get("attention.head_count"), file.get("embedding_length")
    for key, value in {"attention.head_count": heads, "embedding_length": width}.items():
        if not isinstance(value, int) or value < 1:
            raise problem("GGUF field", file=file.path, key=f"{file.architecture}.{key}", value=value)
    head_dim = file.get("attention.key_length") or width // heads
    for key, wanted in {"attention.value_length": head_dim, "rope.dimension_count": int(part * head_dim)}.items():
        if file.get(key, wanted) != wanted:
            raise problem("GGUF field", file=file.path, key=f"{file.architecture}.{key}", value=file.get(key))
    return head_dim


def _theta(file: GGUFFile) -> float:
    return as_written(file.get("rope.freq_base", 10000.0))


def _llama_like(file: GGUFFile, every: Fields) -> Fields:
    head_dim = _head_dim(file)
    fields = every | {"head_dim": head_dim, "rope_parameters": rope_parameters(file, _theta(file), head_dim)}
    if file.architecture in ("llama", "granite"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        fields["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    return fields


def _olmo2(file: GGUFFile, every: Fields) -> Fields:
    """Raises: CheckpointError: heads are not the width's parts, as llama.cpp has them there."""
    fields = _llama_like(file, every)
    if fields["head_dim"] * every["num_attention_heads"] != every["hidden_size"]:
        raise problem("GGUF field", file=file.path, key="olmo2.attention.key_length", value=fields["head_dim"])
    return fields


GRANITE_SCALES = frozenset({"embedding_scale", "attention.scale", "residual_scale", "logit_scale"})
"""Granite's multipliers, by GGUF's names."""


def _granite(file: GGUFFile, every: Fields) -> Fields:
    """With the multipliers, or what llama.cpp takes where the file leaves them out.

    Raises:
        CheckpointError: there are no rotary positions, or nothing that divides the logits.
    """
    fields = _llama_like(file, every)
    for name, default in {"rope.scaling.finetuned": True, "logit_scale": 0.0}.items():
        if not file.get(name, default):
            raise problem("GGUF field", file=file.path, key=f"granite.{name}", value=file.get(name))
    scales = {name: as_written(file.get(name, 0.0)) for name in GRANITE_SCALES}
    return fields | {
        "embedding_multiplier": scales["embedding_scale"] or 1.0,
        "attention_multiplier": scales["attention.scale"] or fields["head_dim"] ** -0.5,
        "residual_multiplier": scales["residual_scale"] or 1.0,
        "logits_scaling": scales["logit_scale"],
    }


def _qwen3_moe(file: GGUFFile, every: Fields) -> Fields:
    return _llama_like(file, every) | {
        "num_experts": file.get("expert_count"),
        "num_experts_per_tok": file.get("expert_used_count"),
        "moe_intermediate_size": file.get("expert_feed_forward_length"),
        # Every file that llama.cpp's converter writes is of a model that does so; it computes nothing else.
        "norm_topk_prob": True,
    }


LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, whose queries are scaled by the width over the heads instead of by the head."""


def _gemma(file: GGUFFile, every: Fields) -> Fields:
    head_dim = _head_dim(file)
    largest = file.get("block_count") == LARGEST_GEMMAS[file.architecture]
    scalar = every["hidden_size"] // every["num_attention_heads"] if largest else head_dim
    return every | {"head_dim": head_dim, "query_pre_attn_scalar": scalar}


def _layer_types(file: GGUFFile, layers: int) -> Fields:
    """Which layers have windows, where the file says so: one truth for each, or that every n-th has none."""
    pattern = file.get("attention.sliding_window_pattern")
    if pattern is None:
        return {}
    windows = (
        [pattern == 0 or n % pattern < pattern - 1 for n in range(layers)]
        if isinstance(pattern, int)
        else list(pattern)
    )
    return {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}


def _gemma2(file: GGUFFile, every: Fields) -> Fields:
    fields = _gemma(file, every)
    return fields | {
        **_layer_types(file, every["num_hidden_layers"]),
        "rope_parameters": rope_parameters(file, _theta(file), fields["head_dim"]),
        # Files from before there were such fields mean these.
        "sliding_window": file.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": file.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.get("final_logit_softcapping", 30.0),
    }


def _gemma3(file: GGUFFile, every: Fields) -> Fields:
    fields = _gemma(file, every)
    local = {"rope_type": "default", "rope_theta": as_written(file.get("rope.freq_base_swa", 10000.0))}
    whole = rope_parameters(file, as_written(file.get("rope.freq_base", 1e6)), fields["head_dim"])
    fields["rope_parameters"] = {"sliding_attention": local, "full_attention": whole}
    fields["final_logit_softcapping"] = file.get("final_logit_softcapping")
    if window := file.get("attention.sliding_window"):
        return fields | {"sliding_window": window} | _layer_types(file, every["num_hidden_layers"])
    return fields | {"layer_types": ["full_attention"] * every["num_hidden_layers"]}


def _phi3(file: GGUFFile, every: Fields) -> Fields:
    width = every["hidden_size"] // every["num_attention_heads"]
    part = file.get("rope.dimension_count", width) / width
    head_dim = _head_dim(file, part)
    original = file.get("rope.scaling.original_context_length", every["max_position_embeddings"])
    if LONG_FACTORS in file.tensors:
        rope = {
            "rope_type": "longrope",
            "rope_theta": _theta(file),
            "long_factor": file.values(LONG_FACTORS).tolist(),
            "short_factor": file.values(SHORT_FACTORS).tolist(),
            "original_max_position_embeddings": original,
        }
        if factor := file.get("rope.scaling.attn_factor"):
            rope["attention_factor"] = float(factor)
    else:
        rope = rope_parameters(file, _theta(file), int(part * head_dim))
    return every | {
        "rope_parameters": rope | {"partial_rotary_factor": part},
        "original_max_position_embeddings": original,
        "sliding_window": file.get("attention.sliding_window") or None,
    }


def _transformers_own(file: GGUFFile, every: Fields) -> Fields:
    """Of architectures whose fields transformers reads in full."""
    metadata = {**file.metadata, VOCABULARY[0]: every["vocab_size"]}
    fields = get_gguf_config(metadata, tuple(file.tensors))
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    for name in ("rms_norm_eps", "norm_eps"):
        if name in fields:
            fields[name] = as_written(fields[name])
    rope = dict(fields["rope_parameters"])
    _refuse_stretching(file)
    return fields | {"rope_parameters": rope | {"rope_theta": as_written(rope["rope_theta"])}}


def _refuse_stretching(file: GGUFFile) -> None:
    """Raises: CheckpointError: rotary positions are stretched where transformers reads only plain ones."""
    kind = file.get("rope.scaling.type", "none")
    if kind != "none" or ROPE_FACTORS in file.tensors:
        raise problem("GGUF rope", file=file.path, what=f"{file.architecture}.rope.scaling.type: {kind}")


WINDOWS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
ARCHITECTURES = {
    "llama": Architecture("llama", _llama_like),
    "mistral": Architecture("mistral", _llama_like),
    "qwen2": Architecture("qwen2", _llama_like),
    "qwen3": Architecture("qwen3", _llama_like),
    "qwen3moe": Architecture(
        "qwen3_moe", _qwen3_moe, frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
    ),
    "gemma2": Architecture(
        "gemma2",
        _gemma2,
        WINDOWS | {"attn_logit_softcapping", "final_logit_softcapping"},
    ),
    "gemma3": Architecture("gemma3_text", _gemma3, WINDOWS | {"final_logit_softcapping", "rope.freq_base_swa"}),
    "phi3": Architecture("phi3", _phi3, frozenset({"attention.sliding_window"})),
    # Which layers have no rotary positions follows from their number: every fourth, in transformers too.
    "smollm3": Architecture("smollm3", _llama_like),
    "olmo2": Architecture("olmo2", _olmo2),
    "granite": Architecture("granite", _granite, GRANITE_SCALES),
    "lfm2": Architecture("lfm2", _transformers_own, frozenset({"shortconv.l_cache"})),
    "qwen35": Architecture(
        "qwen3_5_text",
        _transformers_own,
        frozenset(
            {
                *("full_attention_interval", "rope.dimension_sections", "ssm.conv_kernel", "ssm.state_size"),
                *("ssm.group_count", "ssm.time_step_rank", "ssm.inner_size", "nextn_predict_layers"),
            }
        ),
    ),
}
"""By llama.cpp's name."""


def rope_parameters(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Rotary positions, in transformers' words.

    Raises:
        CheckpointError: a way of stretching them that transformers cannot say.
    """
    plain = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FACTORS in file.tensors:
        return plain | llama3_parameters(file, theta, head_dim)
    kind = file.get("rope.scaling.type", "none")
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    if kind == "none" and file.get("rope.scale_linear"):
        kind = "linear"
    if kind == "none" or factor == 1.0:
        return plain
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        return plain | _yarn(file, float(factor))
    raise problem("GGUF rope", file=file.path, what=f"{file.architecture}.rope.scaling.type: {kind}")


def _yarn(file: GGUFFile, factor: float) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length")
    if not original:
        raise problem("GGUF rope", file=file.path, what="yarn without rope.scaling.original_context_length")
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
        if (value := file.get(f"rope.scaling.{key}")) is not None:
            found[name] = float(value)
    # llama.cpp multiplies its own temperature, 1 + 0.1 ln(factor), by attn_factor; transformers takes the product.
    attention = file.get("rope.scaling.yarn_attn_factor", file.get("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        found["attention_factor"] = float(attention) * (1.0 + 0.1 * math.log(factor))
    return found


def llama3_parameters(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3's stretching that give the factors in `rope_freqs.weight`.

    Raises:
        CheckpointError: none do.
    """
    stored = file.values(ROPE_FACTORS)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if stored.shape != frequencies.shape:
        raise problem("GGUF rope", file=file.path, what=f"{len(stored)} factors for {len(frequencies)} frequencies")
    if torch.all(stored == 1):
        return {}
    factor = round(float(stored.max()), 4)
    for original in (2**power for power in range(4, 22)):
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0)):
            if torch.allclose(llama3_factors(frequencies, factor, low, high, original), stored, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise problem("GGUF rope", file=file.path, what=f"{ROPE_FACTORS} that is not Llama 3's")


def llama3_factors(frequencies: torch.Tensor, factor: float, low: float, high: float, original: int) -> torch.Tensor:
    """What each frequency is divided by, as transformers' `llama3` rope type does."""
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
