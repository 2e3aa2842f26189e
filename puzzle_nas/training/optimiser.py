"""AdamW, or Muon with AdamW for what Muon cannot take; the schedule; their state as plain tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import nn

from puzzle_nas.machine import bfloat16_is_fast
from puzzle_nas.progress import console
from puzzle_nas.recipe import OptimiserSettings
from puzzle_nas.training import parallel


def learning_rate_at(step: int, total_steps: int, settings: OptimiserSettings) -> float:
    """Linear warm-up, then a cosine down to the final fraction; `step` counts from 0."""
    warmup = max(1, round(settings.warmup_fraction * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    final = settings.final_learning_rate_fraction
    return settings.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


@functools.cache
def _say_that_muon_is_slow() -> None:
    console.print(
        "  Muon multiplies in bfloat16, and this machine does so slowly: optimiser=adamw is many times as fast."
    )


class Optimiser:
    """Updates the trainable parameters of a module; weight decay on matrices only.

    Muon (Jordan 2024, as torch.optim has it) takes the matrices inside blocks, AdamW embeddings, LM head, norms and
    biases. Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """

    def __init__(self, module: nn.Module, settings: OptimiserSettings, total_steps: int):
        self.settings, self.total_steps = settings, total_steps
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        orthogonal, matrices, vectors = [], [], []
        for name, p in self.parameters.items():
            is_vocabulary = "embed_tokens" in name or "lm_head" in name
            if p.ndim == 2 and settings.optimiser == "muon" and not is_vocabulary:
                orthogonal.append(p)
            else:
                (matrices if p.ndim > 1 else vectors).append(p)
        decay = settings.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.inner: list[torch.optim.Optimizer] = []
        if groups:
            on_gpu = groups[0]["params"][0].is_cuda
            self.inner.append(torch.optim.AdamW(groups, betas=settings.betas, fused=True, capturable=on_gpu))
        if orthogonal:
            if parallel.is_first() and not bfloat16_is_fast(orthogonal[0].device):
                _say_that_muon_is_slow()
            self.inner.append(torch.optim.Muon(orthogonal, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def rate_at(self, step: int) -> float:
        """The scheduled learning rate."""
        return learning_rate_at(step, self.total_steps, self.settings)

    def step(self, step: int, scale: float = 1.0) -> bool:
        """`update` with `scale` times the scheduled learning rate."""
        return bool(self.update(scale * self.rate_at(step)))

    def update(self, rate: float | torch.Tensor, loss: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, update, and clear the gradients.

        Returns:
            False, as a scalar tensor, if a gradient or `loss` was not finite: then nothing was updated. AdamW finds
            that out on the device, so that a CUDA graph can hold all this; Muon waits for it.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = parallel.whole_tensor(nn.utils.get_total_norm(gradients))
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        clip = self.settings.gradient_clip
        too_long = None if clip is None else (norm / clip).clamp_min(1.0)
        for optimiser in self.inner:
            for group in optimiser.param_groups:
                group["lr"] = rate
            if isinstance(optimiser, torch.optim.AdamW):
                # What a gradient scaler does: gradients are divided inside of the update, and infinity prevents it.
                vars(optimiser).update(grad_scale=too_long, found_inf=(~finite).float())
                optimiser.step()
            elif finite:
                for parameter in (p for group in optimiser.param_groups for p in group["params"]):
                    if too_long is not None and parameter.grad is not None:
                        parameter.grad.div_(too_long)
                optimiser.step()
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
            for optimiser in self.inner:
                # `get`: asking a defaultdict would make an entry.
                for key, value in optimiser.state.get(parameter, {}).items():
                    tensors[f"{key}/{name}"] = value
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        owner = {id(p): o for o in self.inner for group in o.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            state = owner[id(parameter)].state[parameter]
            state.clear()
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                if f"{key}/{name}" in tensors:
                    state[key] = tensors[f"{key}/{name}"].to(parameter.device, copy=True)
