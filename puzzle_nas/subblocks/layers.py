"""One sub-block on its own: built from a spec and weights, run inside the parent's layer.

Weights are named relative to their layer: `self_attn.q_proj.weight`, `post_attention_layernorm.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from puzzle_nas.families.anatomy import Anatomy, LayerInputs, SubBlock, parent_type, prefixes
from puzzle_nas.families.loading import entry_of, place_of
from puzzle_nas.modeling import exchanged_layer
from puzzle_nas.specs import Spec, WindowAttention

Weights = dict[str, torch.Tensor]


def made_subblock(
    parent: PreTrainedModel, layer: int, spec: Spec, weights: Mapping[str, torch.Tensor] | None
) -> SubBlock:
    """A variant alone, in a shell of the parent's layer that holds nothing else.

    Args:
        weights: shared, not copied; None leaves everything on the meta device.
    """
    parts = Anatomy(parent)
    places = parts.places(layer)
    config = parent.config
    with no_init_weights(), torch.device("meta"):
        entries = {spec.slot: entry_of(spec, parent_type(config))}
        place = {spec.slot: place_of(places[spec.slot])}
        shell = exchanged_layer(parts.new_layer(config, layer), config, layer, entries, place)
    kept = {name.split(".")[0] for name in prefixes(places[spec.slot])}
    for name, _ in list(shell.named_children()):
        if name not in kept:
            delattr(shell, name)
    if weights is not None:
        shell.load_state_dict(dict(weights), strict=True, assign=True)
    return SubBlock(shell.eval().requires_grad_(False), spec.slot, places[spec.slot])


def subblock_weights(subblock: SubBlock) -> Weights:
    """The weights of one slot of a layer."""
    return {name: w.detach() for name, w in weights_of_slot(subblock.layer.state_dict(), subblock).items()}


def weights_of_slot(weights: Mapping[str, torch.Tensor], subblock: SubBlock) -> Weights:
    """Those of a layer's weights that belong to one slot."""
    return {name: w for name, w in weights.items() if name.startswith(subblock.names())}


def run_with(
    subblocks: Sequence[SubBlock], variants: Mapping[str, SubBlock], x_BTD: torch.Tensor, inputs: LayerInputs
) -> torch.Tensor:
    """The block's output with `variants`, by slot, in place of the layer's own sub-blocks."""
    for own in subblocks:
        x_BTD = x_BTD + variants.get(own.slot, own).added(x_BTD, inputs)
    return x_BTD


def windows_of(specs: Iterable[Spec]) -> tuple[int, ...]:
    """The windows among variants, for which attention needs masks that the parent does not make."""
    return tuple(sorted({spec.window for spec in specs if isinstance(spec, WindowAttention)}))
