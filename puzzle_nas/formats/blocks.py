"""llama.cpp's formats of 32 weights with one float16 scale (and one minimum).

Source: llama.cpp, ggml-common.h and ggml-quants.c; rounding to nearest is that of `gguf.quants`, bit for bit.
"""

from __future__ import annotations

import torch

from puzzle_nas.formats.base import Grid, GridFormat, Rounded, as_bytes, half, inverse

HALF_BLOCK = 16
"""The first half of a block lies in the low four bits of its bytes, the second in the high ones."""


def nibbles(codes_OUW: torch.Tensor) -> torch.Tensor:
    """Low four bits of blocks of 32, two by two."""
    low, high = codes_OUW.unflatten(2, (2, HALF_BLOCK)).unbind(2)
    return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)


class ScaledBlocks(GridFormat):
    """`scale * code`."""

    group = 32

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`."""
        scale = half(step_OG, self.name)
        return Grid(scale.float(), None, {"scale": scale})


class Q8_0(ScaledBlocks):
    """8 bits. -128 is left out, as llama.cpp's products of signed bytes need it."""

    name = "q8_0"
    lowest, highest = -127, 127

    def nearest(self, weight_OI):
        """Half is rounded away from zero."""
        groups = self.groups(weight_OI)
        step = groups.abs().amax(2) / 127
        scaled = groups * inverse(step).unsqueeze(2)
        size = scaled.abs()
        codes = scaled.sign() * (size.floor() + (2 * (size - size.floor())).floor())
        return Rounded(codes.to(torch.int16).flatten(1), self.grid(step))

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = self.groups(rounded.codes_OI).to(torch.int8)
        return {"weight": as_bytes(rounded.grid.stored["scale"].unsqueeze(2), codes)}


class LongerNegative(ScaledBlocks):
    """Codes with one more negative than positive value; the largest weight of a block gets the lowest code."""

    signed_step = True

    def nearest(self, weight_OI):
        """Half is rounded up."""
        groups = self.groups(weight_OI)
        step = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2) / self.lowest
        shifted = (groups * inverse(step).unsqueeze(2) + (0.5 - self.lowest)).trunc() + self.lowest
        return Rounded(shifted.clamp(self.lowest, self.highest).to(torch.int16).flatten(1), self.grid(step))


class Q5_0(LongerNegative):
    """5 bits; the fifth bits lie together."""

    name = "q5_0"
    lowest, highest = -16, 15

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = self.groups(rounded.codes_OI).to(torch.int32) - self.lowest
        places = torch.arange(8, device=codes.device)
        fifth = ((codes >> 4).unflatten(2, (4, 8)) << places).sum(3).to(torch.uint8)
        return {"weight": as_bytes(rounded.grid.stored["scale"].unsqueeze(2), fifth, nibbles(codes))}


class Q4_0(LongerNegative):
    """4 bits."""

    name = "q4_0"
    lowest, highest = -8, 7

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = self.groups(rounded.codes_OI).to(torch.int32) - self.lowest
        return {"weight": as_bytes(rounded.grid.stored["scale"].unsqueeze(2), nibbles(codes))}


class Q4_1(GridFormat):
    """4 bits, `scale * code + minimum`."""

    name = "q4_1"
    group = 32
    lowest, highest = 0, 15
    has_offset = True

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`."""
        scale, minimum = half(step_OG, self.name), half(offset_OG, self.name)
        return Grid(scale.float(), minimum.float(), {"scale": scale, "minimum": minimum})

    def nearest(self, weight_OI):
        """Half is rounded up."""
        groups = self.groups(weight_OI)
        low, high = groups.amin(2), groups.amax(2)
        step = (high - low) / 15
        codes = ((groups - low.unsqueeze(2)) * inverse(step).unsqueeze(2) + 0.5).trunc().clamp(0, 15)
        return Rounded(codes.to(torch.int16).flatten(1), self.grid(step, low))

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = self.groups(rounded.codes_OI).to(torch.int32)
        scale, minimum = (rounded.grid.stored[name].unsqueeze(2) for name in ("scale", "minimum"))
        return {"weight": as_bytes(scale, minimum, nibbles(codes))}
