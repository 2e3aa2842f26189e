"""GGUF files of the parent's own architecture: children whose layers have the parent's sizes, in any formats.

llama.cpp reads one size for all layers of these architectures. So sub-blocks may differ in their formats, and whole
layers may be missing; nothing else may.

Source: llama.cpp, conversion/ and src/models/ of each architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedConfig

from puzzle_nas.errors import CheckpointError
from puzzle_nas.exporters.base import Child
from puzzle_nas.exporters.gguf_contents import Contents, Tensors
from puzzle_nas.exporters.gguf_deci import neighbouring_pairs
from puzzle_nas.families import head_dim_of
from puzzle_nas.parents.gguf_config import ARCHITECTURES, as_written, gguf_config
from puzzle_nas.parents.gguf_file import NEIGHBOURS, GGUFFile

NAMES = {known.model_type: name for name, known in ARCHITECTURES.items()}
"""llama.cpp's names of architectures, by transformers' names of families."""
NOT_COMPUTED = re.compile(
    r"_token_id$|dropout|initializer_range|^(model_type|parent_type|architectures|dtype|transformers_version|use_cache"
    r"|_name_or_path|max_window_layers|no_rope_layer_interval|router_aux_loss_coef|output_router_logits)$"
)
"""Fields of a configuration that change no logits, or say by rule what another says layer by layer."""
EXPERTS = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")
"""Names of the matrices of a mixture's E experts, one weight [E, outputs, inputs] each."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def own_problems(child: Child) -> list[str]:
    """What of a child its parent's architecture in llama.cpp lacks, each a clause."""
    if not kept_layers(child):
        return ["it has no layers left"]
    found, config = [], child.config
    if child.family == "phi3" and config.max_position_embeddings > (config.sliding_window or math.inf):
        found.append("it has a sliding window, which llama.cpp leaves out of phi3")
    if child.family == "olmo2" and config.tie_word_embeddings:
        found.append("its LM head is its embeddings, where olmo2 has one of its own")
    if child.family == "qwen3_moe" and config.num_experts == 1:
        found.append("it has a single expert, which llama.cpp takes for none")
    return found + _misread(child)


def _misread(child: Child) -> list[str]:
    """Fields of the configuration that our own reader would not find again in the file, each a clause."""
    config, kept, architecture = child.config, kept_layers(child), NAMES[child.family]
    writer = gguf.GGUFWriter(None, architecture)
    _write_sizes(config, kept, writer)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    tensors = {part: ((), 0) for parts in _names(child, kept).values() for part in parts if part}
    try:
        read = gguf_config(GGUFFile(Path("model.gguf"), metadata, tensors, {})).to_dict()
    except CheckpointError as error:
        return [f"llama.cpp's {architecture} does not say all of it ({error})"]
    own = _of_kept_layers(config, kept)
    computed = (name for name in read.keys() & own.keys() if not NOT_COMPUTED.search(name))
    return [
        f"it has {name} = {own[name]}, where llama.cpp's {architecture} would take {read[name]}"
        for name in sorted(computed)
        if _in_float32(own[name]) != _in_float32(read[name])
    ]


def _in_float32(value: Any) -> Any:
    """A field of a configuration as GGUF keeps numbers."""
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    return as_written(value) if isinstance(value, float) else value


def own_contents(child: Child) -> Contents:
    """What a file holds of a child that `own_problems` finds nothing in."""
    kept = kept_layers(child)
    return Contents(NAMES[child.family], partial(_write_sizes, child.config, kept), _tensors(child, kept))


def kept_layers(child: Child) -> list[int]:
    """Those that are not removed whole."""
    return [n for n, block in enumerate(child.architecture.layers) if not all(spec.empty for spec in block.values())]


def _of_kept_layers(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The configuration of the parent without the other layers."""
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in ("layer_types", "no_rope_layers"):
        if (by_layer := getattr(config, name, None)) is not None:
            fields[name] = [by_layer[n] for n in kept]
    return config.to_dict() | fields


def _write_sizes(config: PreTrainedConfig, kept: Sequence[int], writer: gguf.GGUFWriter) -> None:
    of_kept = _of_kept_layers(config, kept)
    writer.add_block_count(len(kept))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    _write_rope(rope.get("full_attention", rope), head_dim_of(config), writer)
    if (positions := of_kept.get("original_max_position_embeddings")) is not None:
        writer.add_rope_scaling_orig_ctx_len(positions)
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (cap := of_kept.get(name)) is not None:
            add(cap)
    sliding = [kind == "sliding_attention" for kind in of_kept.get("layer_types") or ()]
    if writer.arch.startswith("gemma") and any(sliding):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(sliding)
    if writer.arch == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if writer.arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if writer.arch == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)


def _write_rope(rope: dict[str, Any], head_dim: int, writer: gguf.GGUFWriter) -> None:
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _names(child: Child, kept: Sequence[int]) -> dict[str, list[str | None]]:
    """llama.cpp's names of every weight, by ours: of its parts, each None where the architecture has no word for it."""
    numbers = {layer: number for number, layer in enumerate(kept)}
    names = gguf.get_tensor_name_map(_number(NAMES[child.family]), len(kept))
    found: dict[str, list[str | None]] = {}
    for name in child.model.state_dict():
        if name == HEAD and child.config.tie_word_embeddings:
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        new = name if layer is None else f"model.layers.{numbers[int(layer[1])]}.{name[layer.end() :]}"
        found[name] = [names.get_name(part, try_suffixes=(".weight", ".bias")) for part in _parts(new)]
    return found


def _tensors(child: Child, kept: Sequence[int]) -> Tensors:
    config, head = child.config, child.architecture.head.format
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = child.model.state_dict()
    found: Tensors = {}
    for name, written in _names(child, kept).items():
        form = head if name in (EMBEDDINGS, HEAD) else child.forms.get(name)
        weight = weights[name].detach()
        if (stored := child.matrix(name) if name in child.forms else child.matrices.get(name)) is not None:
            # The bytes of each row.
            weight = stored.parts["weight"].view(*weight.shape[:-1], -1)
        if (matrix := name.split(".")[-2]) in heads and NAMES[child.family] in NEIGHBOURS:
            weight = neighbouring_pairs(weight, heads[matrix])
        # Gemma's norms multiply by 1 + weight, llama.cpp's by the weight.
        if child.family.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        # Experts' first matrices, [E, 2 I, D], by halves.
        for part, tensor in zip(written, weight.chunk(len(written), dim=weight.ndim - 2), strict=True):
            assert part is not None, f"llama.cpp's {NAMES[child.family]} has no {name}"
            found[part] = (tensor, form)
    return found


def _parts(name: str) -> list[str]:
    """A weight's name as llama.cpp's table has it: of experts' first matrices, one for each half."""
    experts = EXPERTS.fullmatch(name)
    if experts is None:
        return [name]
    parts = ("down_proj",) if experts[2] == "down_proj" else ("gate_proj", "up_proj")
    return [f"{experts[1]}{part}.weight" for part in parts]


def _number(architecture: str) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
