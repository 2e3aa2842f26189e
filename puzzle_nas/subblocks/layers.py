"""One sub-block on its own: built from a spec and weights, run inside the parent's layer.

Weights are named relative to their layer: `self_attn.q_proj.weight`, `post_attention_layernorm.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.initialization import no_init_weights

from puzzle_nas.architecture import SLOTS, Spec
from puzzle_nas.modeling import PuzzleConfig
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer

PREFIXES = {"attention": ("self_attn.", "input_layernorm."), "ffn": ("mlp.", "post_attention_layernorm.")}
SKIPS = {"attention": "attention", "ffn": "mlp"}

Weights = dict[str, torch.Tensor]


def subblock_layer(
    config: PuzzleConfig, layer_type: str, spec: Spec, weights: Mapping[str, torch.Tensor]
) -> PuzzleDecoderLayer:
    """A layer that holds only the sub-block `spec`; the other slot is empty. Weights are shared, not copied.

    `config` is the parent's, which is the same for all layers; `layer_type` says whether attention has a window.
    """
    overrides = spec.layer_config()
    skip = [SKIPS[slot] for slot in SLOTS if slot != spec.slot] + overrides.pop("skip", [])
    layer_config = PuzzleConfig(**{**plain_fields(config), **overrides})
    layer_config._attn_implementation = config._attn_implementation
    layer_config.skip = skip
    with no_init_weights(), torch.device("meta"):
        block = PuzzleDecoderLayer(config, layer_config, layer_type, 0)
    block.load_state_dict(dict(weights), strict=True, assign=True)
    return block.requires_grad_(False)


def plain_fields(config: PuzzleConfig) -> dict[str, Any]:
    """The fields of a configuration without its layers' differences."""
    fields = config.to_dict()
    for name in ("per_layer_config", "model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    return fields


def subblock_weights(layer: PuzzleDecoderLayer, slot: str) -> Weights:
    """The weights of one slot of a layer."""
    return {name: w.detach() for name, w in weights_of_slot(layer.state_dict(), slot).items()}


def weights_of_slot(weights: Mapping[str, torch.Tensor], slot: str) -> Weights:
    """Those of a layer's weights that belong to one slot."""
    return {name: w for name, w in weights.items() if name.startswith(PREFIXES[slot])}


def run_with(
    layer: PuzzleDecoderLayer, variants: Mapping[str, PuzzleDecoderLayer], x_BTD, inputs: Mapping[str, Any]
) -> torch.Tensor:
    """The block's output with `variants`, by slot, in place of the layer's own sub-blocks."""
    attended = variants.get("attention", layer).attend(x_BTD, **inputs)
    return variants.get("ffn", layer).feed_forward(attended)
