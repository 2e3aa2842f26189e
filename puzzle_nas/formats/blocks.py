"""llama.cpp's formats of 32 weights with one float16 scale (and one minimum).

Source: llama.cpp, ggml-common.h and ggml-quants.c; rounding to nearest is that of `gguf.quants`, bit for bit.
"""

from __future__ import annotations

import torch

from puzzle_nas.formats.base import Grid, GridFormat, Rounded, as_bytes, finite, half, inverse

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


class MXFP4(GridFormat):
    """4 bits: a sign and one of 0, 1, 2, 3, 4, 6, 8, 12 steps; steps are powers of two.

    Source: Open Compute Project, Microscaling Formats (MX) 1.0; codes are twice its numbers, as in llama.cpp.
    """

    name = "mxfp4"
    group = 32
    lowest, highest = -12, 12
    sizes = (0, 1, 2, 3, 4, 6, 8, 12)
    smallest = 2.0**-126
    """Step; what is stored below is not read as a power of two."""

    def storable(self, step):
        """The nearest power of two."""
        exponent = step.clamp_min(self.smallest).log2().round()
        return torch.where(step > 0, exponent.exp2(), 0.0)

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`."""
        step = finite(self.storable(step_OG), self.name)
        # 2^(e - 128) is stored as e, and frexp says e - 127 of it.
        exponent = torch.where(step > 0, torch.frexp(step).exponent + 127, 0)
        return Grid(step, None, {"exponent": exponent.to(torch.uint8)})

    def snap_(self, scaled):
        """Half is rounded towards zero."""
        size = scaled.abs()
        code = (size - 0.5).ceil_().clamp_(0, 4)
        for border, gap in ((5, 2), (7, 2), (10, 4)):
            code += gap * (size > border)
        return torch.mul(code, scaled.sign(), out=scaled)

    def nearest(self, weight_OI):
        """The largest weight of a block is 8 to 16 steps, and what lies beyond 12 becomes 12."""
        peak = finite(self.groups(weight_OI).abs().amax(2), self.name)
        step = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 4)
        grid = self.grid(torch.where(peak > 0, step, 0.0))
        return Rounded(self.codes(weight_OI, grid), grid)

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = self.groups(rounded.codes_OI).to(torch.int32)
        places = torch.zeros(self.highest + 1, dtype=torch.int32, device=codes.device)
        places[list(self.sizes)] = torch.arange(len(self.sizes), dtype=torch.int32, device=codes.device)
        signed = places[codes.abs()] + len(self.sizes) * (codes < 0)
        return {"weight": as_bytes(rounded.grid.stored["exponent"].unsqueeze(2), nibbles(signed))}


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
