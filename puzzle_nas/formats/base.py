"""What every format can do: round a matrix to nearest, say what an engine reads back, and pack it.

Shapes: O outputs, I inputs, U units (weights that share stored scales), G groups (weights that share one step).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from puzzle_nas.errors import FormatError
from puzzle_nas.formats.layout import LAYOUTS, Layout

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """The values that each weight can take: `step * code + offset`, one step and offset for each group of columns."""

    step_OG: torch.Tensor
    """float32, exactly what an engine computes from what is stored. Zero where a group holds only its offset."""
    offset_OG: torch.Tensor | None
    """float32; None where formats have none."""
    stored: Mapping[str, torch.Tensor]
    """What `pack` writes of it, by name, each [O, U, ...]."""

    def chosen(self, mine_OU: torch.Tensor, other: Grid) -> Grid:
        """This grid where `mine_OU` is true, the other one elsewhere."""

        def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            units = a.reshape(*mine_OU.shape, -1)
            return torch.where(mine_OU.unsqueeze(-1), units, b.reshape(units.shape)).reshape(a.shape)

        offset = None if self.offset_OG is None else choose(self.offset_OG, other.offset_OG)
        stored = {name: choose(tensor, other.stored[name]) for name, tensor in self.stored.items()}
        return Grid(choose(self.step_OG, other.step_OG), offset, stored)

    def rows(self, which: slice) -> Grid:
        """That of some rows."""
        offset = None if self.offset_OG is None else self.offset_OG[which]
        return Grid(self.step_OG[which], offset, {name: tensor[which] for name, tensor in self.stored.items()})

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """Of matrices one below the other."""
        first = grids[0]
        offset = None if first.offset_OG is None else torch.cat([g.offset_OG for g in grids if g.offset_OG is not None])
        stored = {name: torch.cat([grid.stored[name] for grid in grids]) for name in first.stored}
        return Grid(torch.cat([grid.step_OG for grid in grids]), offset, stored)


@dataclass(frozen=True)
class Rounded:
    """A matrix in a format."""

    codes_OI: torch.Tensor
    """int16; in formats without a grid the weights themselves, in the format's dtype."""
    grid: Grid | None = None

    def rows(self, which: slice) -> Rounded:
        """Some of them."""
        return Rounded(self.codes_OI[which], None if self.grid is None else self.grid.rows(which))

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """The matrices, of so many rows each, that were rounded as one."""
        ends = itertools.accumulate(rows)
        return [self.rows(slice(end - count, end)) for end, count in zip(ends, rows, strict=True)]

    @staticmethod
    def joined(parts: Sequence[Rounded]) -> Rounded:
        """Matrices one below the other."""
        grids = [part.grid for part in parts if part.grid is not None]
        return Rounded(torch.cat([part.codes_OI for part in parts]), Grid.joined(grids) if grids else None)

    def dequantised(self) -> torch.Tensor:
        """The matrix as an engine reads it, float32 [O, I], bit for bit."""
        if self.grid is None:
            return self.codes_OI.float()
        # Codes are integers, so this is a copy, and large where the matrix is a head.
        values = self.codes_OI.float().unflatten(1, (self.grid.step_OG.shape[1], -1))
        values.mul_(self.grid.step_OG.unsqueeze(-1))
        if self.grid.offset_OG is not None:
            values.add_(self.grid.offset_OG.unsqueeze(-1))
        return values.flatten(1)


class Format(ABC):
    """A way to store a matrix."""

    name: ClassVar[str]

    @property
    def layout(self) -> Layout:
        """Its bytes."""
        return LAYOUTS[self.name]

    @abstractmethod
    def nearest(self, weight_OI: torch.Tensor) -> Rounded:
        """Round as the format's own tools do.

        Raises:
            FormatError: rows do not divide into blocks, or weights are too large.
        """

    @abstractmethod
    def pack(self, rounded: Rounded) -> Tensors:
        """The tensors that a file holds, by the suffix of their names; GGUF's is one, uint8 [O, bytes of a row]."""


class FloatFormat(Format):
    """Each weight by itself in a float type."""

    dtype: ClassVar[torch.dtype]

    def nearest(self, weight_OI):
        """Round half to even."""
        return Rounded(finite(weight_OI.to(self.dtype), self.name))

    def pack(self, rounded):
        """See `Format.pack`."""
        return {"weight": rounded.codes_OI.contiguous().view(torch.uint8)}


class GridFormat(Format):
    """Codes on a grid of steps."""

    group: ClassVar[int | None]
    """Columns that share a step; None means the row."""
    lowest: ClassVar[int]
    highest: ClassVar[int]
    signed_step: ClassVar[bool] = False
    """Whether steps may be negative, so that the longer end of the codes can be the positive one."""
    has_offset: ClassVar[bool] = False
    largest_offset: ClassVar[float] = math.inf

    def groups(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """float32 [O, G, weights of a group].

        Raises:
            FormatError: rows do not divide into blocks.
        """
        self.layout.check(weight_OI.shape[1])
        return weight_OI.float().unflatten(1, (-1, self.group or weight_OI.shape[1]))

    def units(self, columns: int) -> int:
        """Parts of a row whose stored scales do not depend on each other."""
        return columns // self.layout.block if self.group else 1

    @abstractmethod
    def grid(self, step_OG: torch.Tensor, offset_OG: torch.Tensor | None = None) -> Grid:
        """The grid nearest to wanted steps and offsets among those that can be stored.

        Raises:
            FormatError: they are too large to be stored.
        """

    def storable(self, step: torch.Tensor) -> torch.Tensor:
        """Steps as they can be stored, where that changes them by more than rounding to 16 bits does."""
        return step

    def snap_(self, scaled: torch.Tensor) -> torch.Tensor:
        """The nearest code to each weight that is given in steps, in place."""
        return scaled.round_().clamp_(self.lowest, self.highest)

    def codes(self, weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The code nearest to each weight, int16 [O, I]."""
        groups = weight_OI.float().unflatten(1, (grid.step_OG.shape[1], -1))
        if grid.offset_OG is not None:
            groups = groups - grid.offset_OG.unsqueeze(-1)
        codes = self.snap_(groups * inverse(grid.step_OG).unsqueeze(-1))
        return codes.to(torch.int16).flatten(1)


def inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step, and zero where the step is zero."""
    return torch.where(step == 0, 0.0, 1 / step)


def finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor`, all of which a format can store.

    Raises:
        FormatError: something is infinite or not a number.
    """
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{name} cannot hold a matrix: it has weights that are too large or not numbers; use bf16.")
    return tensor


def half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Scales as float16 stores them.

    Raises:
        FormatError: one is too large.
    """
    return finite(tensor.to(torch.float16), name)


def as_bytes(*parts: torch.Tensor) -> torch.Tensor:
    """Tensors [O, U, ...] of any types one after the other, uint8 [O, bytes of a row]."""
    return torch.cat([part.contiguous().view(torch.uint8).flatten(2) for part in parts], dim=2).flatten(1)
