"""AdamW with warm-up and cosine, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from puzzle_nas.recipe import OptimiserSettings


def learning_rate_at(step: int, total_steps: int, settings: OptimiserSettings) -> float:
    """Linear warm-up, then a cosine down to the final fraction; `step` counts from 0."""
    warmup = max(1, round(settings.warmup_fraction * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    final = settings.final_learning_rate_fraction
    return settings.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimiser:
    """AdamW over the trainable parameters of a module; weight decay on matrices only."""

    def __init__(self, module: nn.Module, settings: OptimiserSettings, total_steps: int):
        self.settings, self.total_steps = settings, total_steps
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for p in self.parameters.values() if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in self.parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], betas=settings.betas, fused=True)

    def step(self, step: int) -> None:
        """Clip, update, and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate_at(step, self.total_steps, self.settings)
        if self.settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name; `load` takes them back."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            for key, value in self.adam.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            state = self.adam.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in tensors:
                    value = tensors[f"{key}/{name}"]
                    state[key] = value.clone() if key == "step" else value.clone().to(parameter.device)
