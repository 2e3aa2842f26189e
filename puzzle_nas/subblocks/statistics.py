"""Sums over calibration tokens, for closed-form initialisation.

Shapes: N tokens, D hidden, F FFN channels, I and O any input and output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer


@dataclass(frozen=True)
class Activations:
    """What one parent layer computes on a batch, tokens flattened, in the parent's precision."""

    layer: PuzzleDecoderLayer
    attention_in_BTD: torch.Tensor
    """After the norm; not flattened, for variants that attend."""
    inputs: Mapping[str, Any]
    """Masks and positions."""
    attention_out_ND: torch.Tensor
    ffn_in_ND: torch.Tensor
    channels_NF: torch.Tensor
    ffn_out_ND: torch.Tensor
    out_ND: torch.Tensor
    """The block's output."""

    @property
    def attention_in_ND(self) -> torch.Tensor:
        """`attention_in_BTD`, flattened."""
        return self.attention_in_BTD.flatten(0, 1)


@dataclass
class Moments:
    """Weighted sums over tokens, float64: gram = sum w x x' [I, I], cross = sum w x y' [I, O], or a vector."""

    gram: torch.Tensor
    cross: torch.Tensor | None = None

    def __iadd__(self, other: Moments) -> Moments:
        self.gram += other.gram
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        return self


LayerStatistics = dict[str, Moments]


def moments(x_NI: torch.Tensor, y_NO: torch.Tensor | None = None, weights_N: torch.Tensor | None = None) -> Moments:
    """Moments of one batch. Sums over batches are float64."""
    with fast_products(x_NI):
        x = x_NI.float()
        wx = x if weights_N is None else x * weights_N.float().unsqueeze(1)
        cross = None if y_NO is None else (wx.T @ y_NO.float()).double()
        return Moments((wx.T @ x).double(), cross)


@contextmanager
def fast_products(activations: torch.Tensor):
    """Let float32 products multiply in bfloat16 (with float32 sums) where the activations came out of it anyway."""
    backend = torch.backends.cuda.matmul if activations.device.type == "cuda" else torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    if activations.dtype == torch.bfloat16:
        backend.fp32_precision = "tf32" if activations.device.type == "cuda" else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def inverse_norm(y_ND: torch.Tensor, power: int = 1) -> torch.Tensor:
    """Token weights 1 / |y|^power, [N]: a few tokens with massive activations shall not own the fit."""
    return y_ND.float().norm(dim=-1).clamp_min(1e-6) ** -power


def observe_layer(layer: PuzzleDecoderLayer, x_BTD: torch.Tensor, inputs: Mapping[str, Any]) -> Activations:
    """Everything a parent layer computes on a batch."""
    attention_in = layer.input_layernorm(x_BTD)
    masks = inputs["attention_mask"]
    own_inputs = {
        **inputs,
        "attention_mask": masks.get(layer.layer_type) if isinstance(masks, dict) else masks,
    }
    attention_out = layer.self_attn(attention_in, **own_inputs)[0]
    middle = x_BTD + attention_out
    ffn_in = layer.post_attention_layernorm(middle)
    channels = layer.mlp.channels(ffn_in)
    ffn_out = layer.mlp.down_proj(channels)
    out = middle + ffn_out
    flat = (tensor.flatten(0, 1) for tensor in (attention_out, ffn_in, channels, ffn_out, out))
    return Activations(layer, attention_in, own_inputs, *flat)


def add_observations(
    statistics: LayerStatistics,
    observations: Mapping[str, Callable[[Activations], Moments]],
    batch: Activations,
) -> None:
    """Add one batch to a layer's sums, in place."""
    for key, observe in observations.items():
        if key in statistics:
            statistics[key] += observe(batch)
        else:
            statistics[key] = observe(batch)
