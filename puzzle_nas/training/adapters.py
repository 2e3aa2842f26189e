"""Low-rank adapters (LoRA, Hu et al. 2021): a child learns through two thin matrices beside each of its own.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from puzzle_nas.training.parallel import whole_tensor


def _add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + inputs[0] @ module.adapter_in.T @ module.adapter_out.T


def add_adapters(model: nn.Module, rank: int, seed: int) -> None:
    """Put an adapter of `rank` beside each linear layer in `model`, without effect as yet."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            inputs_RI = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
            outputs_OR = torch.zeros(module.out_features, rank)
            module.adapter_in = nn.Parameter(inputs_RI.to(module.weight.device))
            module.adapter_out = nn.Parameter(outputs_OR.to(module.weight.device))
            module.register_forward_hook(_add)


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value, in float32, of each weight with its adapter added to it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "adapter_in"):
            weight_OI, outputs_OR, inputs_RI = map(whole_tensor, (module.weight, module.adapter_out, module.adapter_in))
            yield f"{name}.weight", weight_OI.float() + outputs_OR @ inputs_RI
