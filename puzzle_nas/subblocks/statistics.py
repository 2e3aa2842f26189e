"""Sums over calibration tokens, for closed-form initialisation.

Shapes: B batch, T tokens, N = B * T, D hidden, I and O any input and output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from puzzle_nas.families.anatomy import LayerInputs, SubBlock


@dataclass(frozen=True)
class Activations:
    """What one sub-block of the parent computes on a batch, in the parent's precision."""

    inputs: LayerInputs
    read_BTD: torch.Tensor
    """What the mixer reads, after the norm; not flattened, for variants that attend."""
    last_input_NI: torch.Tensor | None
    """What the mixer's last matrix receives; None where the mixer is opaque."""
    mixed_ND: torch.Tensor
    """The mixer's output, before any output norm."""
    block_output_ND: torch.Tensor
    """The residual stream after the whole block."""

    @property
    def read_ND(self) -> torch.Tensor:
        """`read_BTD`, flattened."""
        return self.read_BTD.flatten(0, 1)


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
Observe = Callable[[Activations], Moments]


def moments(x_NI: torch.Tensor, y_NO: torch.Tensor | None = None, weights_N: torch.Tensor | None = None) -> Moments:
    """Moments of one batch. Sums over batches are float64."""
    with fast_products(x_NI):
        x = x_NI.float()
        wx = x if weights_N is None else x * weights_N.float().unsqueeze(1)
        cross = None if y_NO is None else (wx.T @ y_NO.float()).double()
        return Moments((wx.T @ x).double(), cross)


@contextmanager
def fast_products(activations: torch.Tensor) -> Iterator[None]:
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


def observed(
    subblocks: Sequence[SubBlock], x_BTD: torch.Tensor, inputs: LayerInputs
) -> tuple[dict[str, Activations], torch.Tensor]:
    """What every sub-block of a layer computes on a batch, by slot, and the block's output, [B, T, D]."""
    found = {}
    for subblock in subblocks:
        read = subblock.read(x_BTD)
        if subblock.last is None:
            mixed, received = subblock.mixed(read, inputs), None
        else:
            mixed, received = subblock.with_last_input(read, inputs)
        found[subblock.slot] = (read, received, mixed)
        x_BTD = x_BTD + subblock.finished(mixed)
    out_ND = x_BTD.flatten(0, 1)
    activations = {
        slot: Activations(
            inputs, read, None if received is None else received.flatten(0, 1), mixed.flatten(0, 1), out_ND
        )
        for slot, (read, received, mixed) in found.items()
    }
    return activations, x_BTD


def add_observations(
    statistics: LayerStatistics, observations: Mapping[str, Observe], activations: Activations
) -> None:
    """Add one batch to a sub-block's sums, in place."""
    for key, observe in observations.items():
        if key in statistics:
            statistics[key] += observe(activations)
        else:
            statistics[key] = observe(activations)
