"""llama.cpp's K-quants: blocks of 256 weights with one or two float16 scales, whose groups have small scales of theirs.

Source: llama.cpp, ggml-common.h and ggml-quants.c; what is read is that of `gguf.quants`, bit for bit. Rounding to
nearest takes each group's largest weights as the ends of its codes. (llama.cpp's own tool searches scales, see
`rounding.scale_search`.)
"""

from __future__ import annotations

import torch

from puzzle_nas.formats.base import Grid, GridFormat, Rounded, as_bytes, half, inverse


def shared_scale(
    values_OUG: torch.Tensor, peak_code: int, lowest: int, highest: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One float16 scale [O, U] that gives the largest value of each block `peak_code`, and all codes [O, U, groups]."""
    peak = values_OUG.gather(2, values_OUG.abs().argmax(2, keepdim=True)).squeeze(2)
    scale = half(peak / peak_code, name)
    codes = (values_OUG * inverse(scale.float()).unsqueeze(2)).round().clamp(lowest, highest)
    return scale, codes.to(torch.int16)


def scaled(scale_OU: torch.Tensor, codes_OUG: torch.Tensor) -> torch.Tensor:
    """What engines make of a block's scale and the codes on it, float32 [O, G]."""
    return (scale_OU.float().unsqueeze(2) * codes_OUG.float()).flatten(1)


class WithMinima(GridFormat):
    """`scale * scale code * code - minimum * minimum code`, groups of 32, scale and minimum codes of 6 bits."""

    group = 32
    lowest = 0
    has_offset = True
    largest_offset = 0.0

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`. Offsets above zero become zero: there is no code for them."""
        assert offset_OG is not None
        step, minimum = (values.clamp_min(0).unflatten(1, (-1, 8)) for values in (step_OG, -offset_OG))
        scale, scale_codes = shared_scale(step, 63, 0, 63, self.name)
        floor, floor_codes = shared_scale(minimum, 63, 0, 63, self.name)
        stored = {
            "scale": scale,
            "minimum": floor,
            "scale_codes": scale_codes.to(torch.uint8),
            "minimum_codes": floor_codes.to(torch.uint8),
        }
        return Grid(scaled(scale, scale_codes), -scaled(floor, floor_codes), stored)

    def nearest(self, weight_OI):
        """The smallest and largest weight of a group are the ends of its codes."""
        groups = self.groups(weight_OI)
        low = groups.amin(2).clamp_max(self.largest_offset)
        grid = self.grid((groups.amax(2) - low) / self.highest, low)
        return Rounded(self.codes(weight_OI, grid), grid)

    @staticmethod
    def _scale_bytes(grid: Grid) -> torch.Tensor:
        """Eight scale and eight minimum codes of 6 bits in twelve bytes."""
        scale, minimum = (grid.stored[name].to(torch.int32) for name in ("scale_codes", "minimum_codes"))
        first = scale[..., :4] | ((scale[..., 4:] >> 4) << 6)
        second = minimum[..., :4] | ((minimum[..., 4:] >> 4) << 6)
        third = (scale[..., 4:] & 15) | ((minimum[..., 4:] & 15) << 4)
        return torch.cat([first, second, third], dim=2).to(torch.uint8)

    def _head(self, grid: Grid) -> tuple[torch.Tensor, ...]:
        scale, minimum = (grid.stored[name].unsqueeze(2) for name in ("scale", "minimum"))
        return scale, minimum, self._scale_bytes(grid)

    @staticmethod
    def _nibbles(codes: torch.Tensor) -> torch.Tensor:
        """Low four bits, groups of 32 two by two."""
        pairs = codes.unflatten(2, (4, 2, 32))
        return ((pairs[..., 0, :] & 15) | ((pairs[..., 1, :] & 15) << 4)).to(torch.uint8)


class Q4_K(WithMinima):
    """4 bits."""

    name = "q4_k"
    highest = 15

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = rounded.codes_OI.to(torch.int32).unflatten(1, (-1, 256))
        return {"weight": as_bytes(*self._head(rounded.grid), self._nibbles(codes))}


class Q5_K(WithMinima):
    """5 bits; the fifth bits of a block's eight groups lie together."""

    name = "q5_k"
    highest = 31

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = rounded.codes_OI.to(torch.int32).unflatten(1, (-1, 256))
        places = torch.arange(8, device=codes.device).unsqueeze(1)
        fifth = ((codes >> 4).unflatten(2, (8, 32)) << places).sum(2).to(torch.uint8)
        return {"weight": as_bytes(*self._head(rounded.grid), fifth, self._nibbles(codes))}


class Q6_K(GridFormat):
    """6 bits, `scale * scale code * code`, groups of 16, scale codes of 8 bits with sign."""

    name = "q6_k"
    group = 16
    lowest, highest = -32, 31
    signed_step = True

    def grid(self, step_OG, offset_OG=None):
        """See `GridFormat.grid`."""
        scale, codes = shared_scale(step_OG.unflatten(1, (-1, 16)), -128, -128, 127, self.name)
        return Grid(scaled(scale, codes), None, {"scale": scale, "scale_codes": codes.to(torch.int8)})

    def nearest(self, weight_OI):
        """The largest weight of a group gets the lowest code."""
        groups = self.groups(weight_OI)
        peak = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        grid = self.grid(peak / self.lowest)
        return Rounded(self.codes(weight_OI, grid), grid)

    def pack(self, rounded):
        """See `Format.pack`."""
        codes = rounded.codes_OI.to(torch.int32).unflatten(1, (-1, 2, 4, 32)) - self.lowest
        first, second, third, fourth = ((codes & 15)[..., i, :] for i in range(4))
        low = torch.cat([first | (third << 4), second | (fourth << 4)], dim=3)
        places = 2 * torch.arange(4, device=codes.device).unsqueeze(1)
        high = ((codes >> 4) << places).sum(3)
        stored = rounded.grid.stored
        parts = low.to(torch.uint8), high.to(torch.uint8), stored["scale_codes"], stored["scale"].unsqueeze(2)
        return {"weight": as_bytes(*parts)}
