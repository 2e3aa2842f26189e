"""vLLM's formats, as compressed-tensors stores them: int8 with a scale for each row, int4 with one for each group.

Source: compressed-tensors, quantization/utils/helpers.py (symmetric scales: the largest weight over half the number
of codes) and compressors/pack_quantized (four-bit codes plus 8, eight in an int32, the first in the lowest bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from puzzle_nas.formats.base import Grid, GridFormat, Rounded, finite


class Symmetric(GridFormat):
    """`scale * code`."""

    scale_dtype: torch.dtype
    group_config: ClassVar[Mapping[str, Any]]
    """What a checkpoint's quantization_config says of the matrices of this format, besides their names."""

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`."""
        scale = finite(step_OG.to(self.scale_dtype), self.name)
        return Grid(scale.float(), None, {"scale": scale})

    def nearest(self, weight_OI):
        """The largest weight of a group lies half a step beyond the highest code."""
        step = self.groups(weight_OI).abs().amax(2) / (self.highest + 0.5)
        grid = self.grid(step)
        return Rounded(self.codes(weight_OI, grid), grid)


class Int8(Symmetric):
    """8 bits, one scale a row (the weights of W8A8)."""

    name = "int8"
    group_config = {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"},
        "format": "int-quantized",
    }
    group = None
    lowest, highest = -128, 127
    scale_dtype = torch.float32

    def pack(self, rounded):
        """See `Format.pack`."""
        return {"weight": rounded.codes_OI.to(torch.int8), "weight_scale": rounded.grid.stored["scale"]}


class Int4(Symmetric):
    """4 bits, one scale for 128 weights (the weights of W4A16)."""

    name = "int4"
    group = 128
    group_config = {
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group",
            "group_size": group,
        },
        "input_activations": None,
        "format": "pack-quantized",
    }
    lowest, highest = -8, 7
    scale_dtype = torch.bfloat16

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = (rounded.codes_OI.to(torch.int64) - self.lowest).unflatten(1, (-1, 8))
        packed = (codes << (4 * torch.arange(8, device=codes.device))).sum(2)
        return {
            "weight_packed": (packed - ((packed >> 31) << 32)).to(torch.int32),
            "weight_scale": rounded.grid.stored["scale"],
            "weight_shape": torch.tensor(rounded.codes_OI.shape),
        }
