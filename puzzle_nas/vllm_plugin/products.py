"""vLLM's products of matrices in formats on CPUs, mended where its transformers backend or float32 needs it.

As of vLLM 0.32: the fast product of eight bits (AMX) is taken for every number type, multiplies 16 bits only, and is
handed what the layer receives, which in the transformers backend has a dimension for the batch. That of four bits
multiplies 16 bits only.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import torch
from torch.nn import functional

FEWEST_OUTPUTS = 32
"""The fast product of eight bits takes outputs by so many, and stops where half as many are left."""


def mend_products_on_cpu() -> None:
    """Let products be taken where they can be; in float32, which verification wants, others stand in."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    if not hasattr(CPUInt8ScaledMMLinearKernel, "mended"):
        _mend_eight_bits(CPUInt8ScaledMMLinearKernel)
        _mend_four_bits(CPUWNA16LinearKernel)
        CPUInt8ScaledMMLinearKernel.mended = True


def _mend_eight_bits(kernel) -> None:
    prepare, fast = kernel.process_weights_after_loading, kernel._apply_weights_sgl

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        outputs = getattr(layer, self.layer_param_names[0]).shape[0]
        if torch.get_default_dtype() == torch.float32 or outputs % FEWEST_OUTPUTS:
            self.linear_method = self._apply_weights_onednn
            self.process_weights_for_onednn(layer)
        else:
            prepare(self, layer)

    def _apply_weights_sgl(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None):
        return fast(self, layer, x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])

    kernel.process_weights_after_loading, kernel._apply_weights_sgl = process_weights_after_loading, _apply_weights_sgl


def _mend_four_bits(kernel) -> None:
    prepare, multiply = kernel.process_weights_after_loading, kernel.apply_weights

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if self.config.act_type != torch.float32:
            return prepare(self, layer)
        packed, scale_OG = getattr(layer, self.w_q_name).data, getattr(layer, self.w_s_name).data
        codes_OI = ((packed.unsqueeze(2) >> (4 * torch.arange(8))) & 15).flatten(1) - 8
        groups = codes_OI.float().unflatten(1, (scale_OG.shape[1], -1))
        layer.register_buffer("unpacked", (groups * scale_OG.unsqueeze(2)).flatten(1), persistent=False)
        return None

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None):
        if self.config.act_type != torch.float32:
            return multiply(self, layer, x, bias)
        return functional.linear(x, layer.unpacked, bias)

    kernel.process_weights_after_loading, kernel.apply_weights = process_weights_after_loading, apply_weights


__all__ = ["mend_products_on_cpu"]
