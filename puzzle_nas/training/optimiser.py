"""AdamW, its schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from puzzle_nas.training import parallel

BETAS = (0.9, 0.95)
"""Of AdamW's moving averages."""
WARMUP_FRACTION = 0.05
"""Of the steps, in which the rate rises."""
FINAL_FRACTION = 0.1
"""Of the peak learning rate, at the end."""
LARGEST_NORM = 1.0
"""Of all gradients together; larger ones are scaled down to it."""


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to the final fraction; `step` counts from 0."""
    warmup = max(1, round(WARMUP_FRACTION * total_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimiser:
    """Updates the trainable parameters of a module by AdamW, without weight decay.

    Args:
        learning_rate: at its peak.
    """

    def __init__(self, module: nn.Module, learning_rate: float, total_steps: int):
        self.learning_rate, self.total_steps = learning_rate, total_steps
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        trained = list(self.parameters.values())
        on_gpu = any(p.is_cuda for p in trained)
        # As a group: it may be empty, for a module of nothing.
        self.inner = torch.optim.AdamW(
            [{"params": trained}], betas=BETAS, weight_decay=0.0, fused=True, capturable=on_gpu
        )

    def rate_at(self, step: int) -> float:
        """The scheduled learning rate."""
        return learning_rate_at(step, self.total_steps, self.learning_rate)

    def step(self, step: int) -> bool:
        """`update` with the scheduled learning rate."""
        return bool(self.update(self.rate_at(step)))

    def update(self, rate: float | torch.Tensor, loss: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, update, and clear the gradients.

        Returns:
            False, as a scalar tensor, if a gradient or `loss` was not finite: then nothing was updated. That is found
            out on the device, so that a CUDA graph can hold all this.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = parallel.whole_tensor(nn.utils.get_total_norm(gradients))
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        too_long = (norm / LARGEST_NORM).clamp_min(1.0)
        for group in self.inner.param_groups:
            group["lr"] = rate
        # What a gradient scaler does: gradients are divided inside of the update, and infinity prevents it.
        vars(self.inner).update(grad_scale=too_long, found_inf=(~finite).float())
        self.inner.step()
        self.clear()
        return finite

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name; `load` takes them back."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            # `get`: asking a defaultdict would make an entry.
            for key, value in self.inner.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            state = self.inner.state[parameter]
            state.clear()
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in tensors:
                    state[key] = tensors[f"{key}/{name}"].to(parameter.device, copy=True)
