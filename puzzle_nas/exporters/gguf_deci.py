"""GGUF files of the architecture `deci`: children of Llama's relatives, of any shape.

llama.cpp's `deci` layer is a norm and a mixer (attention or one matrix), then a norm and a gated FFN. It loads other
layers too but then leaves out the attention (one without FFN) or stops (a first layer without mixer, a last one
without FFN, a model without any attention). So a child is taken apart into its sub-blocks, and these are packed into
full layers again: a linear FFN is a mixer of one matrix, what has no FFN behind it gets a tiny one of zeros, a first
layer without mixer a matrix of zeros, a model without attention one head of zeros, and empty layers vanish. The number
of layers in the file is therefore not the child's.

Source: llama.cpp, src/models/deci.cpp, and its convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import gguf
import torch
from transformers import PreTrainedConfig

from puzzle_nas.exporters.base import Child
from puzzle_nas.exporters.gguf_contents import Contents, Tensors
from puzzle_nas.exporters.llama_like import problems
from puzzle_nas.families import head_dim_of
from puzzle_nas.parents.gguf_config import llama3_factors
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp, Spec

SMALLEST_WIDTH = 32
"""Channels of an FFN that does nothing: one block of llama.cpp's quantised types."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mixer:
    """The first half of a `deci` layer. Without KV heads it is the matrix `attn_output`."""

    num_heads: int
    num_key_value_heads: int
    tensors: Weights
    format: str | None = None
    """Of its matrices, besides the file's precision."""


@dataclass(frozen=True)
class FeedForward:
    """The second half of a `deci` layer."""

    width: int
    tensors: Weights
    format: str | None = None


def _grouped_attention(spec: GroupedAttention, weights: Weights, config: PreTrainedConfig) -> list[Mixer]:
    tensors = {"attn_norm.weight": weights["input_layernorm.weight"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": spec.num_key_value_heads}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if (w := weights.get(f"self_attn.{ours}.{part}")) is not None:
                tensors[f"{theirs}.{part}"] = neighbouring_pairs(w, heads[ours]) if ours in heads else w
    return [Mixer(config.num_attention_heads, spec.num_key_value_heads, tensors)]


def _matrix(norm: torch.Tensor, matrix: torch.Tensor, config: PreTrainedConfig) -> Mixer:
    return Mixer(config.num_attention_heads, 0, {"attn_norm.weight": norm, "attn_output.weight": matrix})


def _linear(spec: Linear, weights: Weights, config: PreTrainedConfig) -> list[Mixer]:
    of_attention = spec.slot == "attention"
    norm, mixer = ("input_layernorm", "self_attn") if of_attention else ("post_attention_layernorm", "mlp")
    return [_matrix(weights[f"{norm}.weight"], weights[f"{mixer}.linear.weight"], config)]


def _gated_ffn(spec: GatedFFN, weights: Weights, _: PreTrainedConfig) -> list[FeedForward]:
    tensors = {"ffn_norm.weight": weights["post_attention_layernorm.weight"]}
    for ours, theirs in {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}.items():
        for part in ("weight", "bias"):
            if (w := weights.get(f"mlp.{ours}.{part}")) is not None:
                tensors[f"{theirs}.{part}"] = w
    return [FeedForward(spec.intermediate_size, tensors)]


def _nothing(*_) -> list:
    return []


def _idle_attention(config: PreTrainedConfig) -> Mixer:
    """One head of zeros."""
    hidden, head = config.hidden_size, head_dim_of(config)
    matrices = {f"attn_{name}.weight": torch.zeros(head, hidden) for name in "qkv"}
    tensors = {"attn_norm.weight": torch.ones(hidden), **matrices, "attn_output.weight": torch.zeros(hidden, head)}
    return Mixer(1, 1, tensors)


def idle_ffn(config: PreTrainedConfig) -> FeedForward:
    """One of zeros, as narrow as it can be."""
    hidden = config.hidden_size
    tensors = {
        "ffn_norm.weight": torch.ones(hidden),
        "ffn_gate.weight": torch.zeros(SMALLEST_WIDTH, hidden),
        "ffn_up.weight": torch.zeros(SMALLEST_WIDTH, hidden),
        "ffn_down.weight": torch.zeros(hidden, SMALLEST_WIDTH),
    }
    return FeedForward(SMALLEST_WIDTH, tensors)


def idle_ffns(spec: Spec) -> int:
    """FFNs of zeros that an FFN of that kind takes, at most: behind the attention, and behind a matrix in its place."""
    return 0 if spec.slot != "ffn" or isinstance(spec, GatedFFN) else 1 if spec.empty else 2


def neighbouring_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them: neighbours instead of halves."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


Layers: TypeAlias = list[tuple[Mixer | None, FeedForward]]


def packed(parts: Iterable[Mixer | FeedForward], config: PreTrainedConfig) -> Layers:
    """Sub-blocks in order as `deci` layers that llama.cpp computes rightly."""
    hidden = config.hidden_size
    layers: list[tuple[Mixer | None, FeedForward | None]] = []
    for part in parts:
        if isinstance(part, Mixer):
            layers.append((part, None))
        elif layers and layers[-1][1] is None:
            layers[-1] = (layers[-1][0], part)
        else:
            layers.append((None, part))
    if not any(mixer and mixer.num_key_value_heads for mixer, _ in layers):
        if not layers or layers[0][0] is not None:
            layers.insert(0, (None, None))
        layers[0] = (_idle_attention(config), layers[0][1])
    elif layers[0][0] is None:
        layers[0] = (_matrix(torch.ones(hidden), torch.zeros(hidden, hidden), config), layers[0][1])
    return [(mixer, ffn or idle_ffn(config)) for mixer, ffn in layers]


WRITERS = {GroupedAttention: _grouped_attention, GatedFFN: _gated_ffn, Linear: _linear, NoOp: _nothing}


def deci_problems(child: Child) -> list[str]:
    """What of a child of Llama's relatives `deci` lacks, each a clause."""
    found, rope_type = problems(child, "deci"), (child.config.rope_parameters or {}).get("rope_type")
    if child.config.hidden_act != "silu":
        found.append(f"it has the activation {child.config.hidden_act}, where deci has silu")
    if rope_type not in ("default", "llama3", "linear"):
        found.append(f"it has rotary positions of type {rope_type}, which are not written yet")
    return found


def deci_contents(child: Child) -> Contents:
    """What a file holds of a child that `deci_problems` finds nothing in."""
    layers = _layers(child)
    return Contents("deci", partial(_write_sizes, child.config, layers), _tensors(child, layers))


def _layers(child: Child) -> Layers:
    """The child's sub-blocks as layers of the file; those that do nothing are left out."""
    parts = [
        replace(part, format=spec.format)
        for layer, _, spec in child.architecture
        for part in WRITERS[type(spec)](spec, child.layer_weights(layer), child.config)
    ]
    return packed(parts, child.config)


def _write_sizes(config: PreTrainedConfig, layers: Layers, writer: gguf.GGUFWriter) -> None:
    rope = config.rope_parameters or {}
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_head_count([mixer.num_heads if mixer else 0 for mixer, _ in layers])
    writer.add_head_count_kv([mixer.num_key_value_heads if mixer else 0 for mixer, _ in layers])
    writer.add_feed_forward_length([ffn.width for _, ffn in layers])


def _tensors(child: Child, layers: Layers) -> Tensors:
    config, head = child.config, child.architecture.head.format
    ends = {name: child.model.get_parameter(name).detach() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends = {name: child.matrices[name].parts["weight"] if name in child.matrices else w for name, w in ends.items()}
    tensors = {
        "token_embd.weight": (ends["model.embed_tokens.weight"], head),
        "output_norm.weight": (child.model.get_parameter("model.norm.weight").detach(), None),
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = (ends["lm_head.weight"], head)
    if config.rope_parameters and config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (_llama3_factors(config), None)
    for number, (mixer, ffn) in enumerate(layers):
        for part in (mixer, ffn):
            if part is not None:
                tensors |= {f"blk.{number}.{name}": (w, part.format) for name, w in part.tensors.items()}
    return tensors


def _llama3_factors(config: PreTrainedConfig) -> torch.Tensor:
    """What Llama 3 divides each rotary frequency by, [head_dim / 2]."""
    rope = config.rope_parameters or {}
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    head_dim = head_dim_of(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return llama3_factors(frequencies, rope["factor"], low, high, old).float()
