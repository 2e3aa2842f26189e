"""The matrices of a model that are stored in formats, by the names of its weights; their file beside the weights'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from puzzle_nas.formats.base import Grid, GridFormat, Rounded, Tensors
from puzzle_nas.formats.registry import format_of

FILE = "formats.safetensors"
"""In a checkpoint's folder."""


@dataclass(frozen=True)
class Stack:
    """How transformers holds the matrices of a mixture's experts in one weight, [E, O, I]."""

    experts: int
    is_transposed: bool
    """Whether it is [E, I, O] instead."""

    @staticmethod
    def of(module: nn.Module, weight: torch.Tensor) -> Stack | None:
        """That of a weight of a module; None where the weight is one matrix."""
        return Stack(len(weight), bool(module.is_transposed)) if weight.ndim == 3 else None

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """All experts' rows, one expert's below the other's, [E * O, I]."""
        return (weight.mT if self.is_transposed else weight).flatten(0, 1)

    def weight(self, rows_OI: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`."""
        stacked = rows_OI.unflatten(0, (self.experts, -1))
        return stacked.mT.contiguous() if self.is_transposed else stacked


@dataclass(frozen=True)
class Matrix:
    """One matrix in one format, or those of a mixture's experts: rows do not depend on each other."""

    form: str
    rounded: Rounded
    stack: Stack | None = None

    @classmethod
    def nearest(cls, form: str, module: nn.Module, weight: torch.Tensor) -> Matrix:
        """A weight of a module, each number rounded to nearest."""
        stack = Stack.of(module, weight)
        return cls(form, format_of(form).nearest(weight if stack is None else stack.rows(weight)), stack)

    @property
    def weight(self) -> torch.Tensor:
        """What engines read, float32, in the shape that transformers gives it: [O, I], or as `stack` says."""
        rows_OI = self.rounded.dequantised()
        return rows_OI if self.stack is None else self.stack.weight(rows_OI)

    def of(self, weight: torch.Tensor) -> Matrix:
        """Other weights, in the shape of `weight`, on the same scales, each rounded to nearest."""
        form, grid = format_of(self.form), self.rounded.grid
        rows_OI = weight if self.stack is None else self.stack.rows(weight)
        if grid is None or not isinstance(form, GridFormat):
            return replace(self, rounded=form.nearest(rows_OI))
        return replace(self, rounded=Rounded(form.codes(rows_OI, grid), grid))

    def to(self, device: torch.device) -> Matrix:
        """The same on a device."""
        codes, grid = self.rounded.codes_OI.to(device), self.rounded.grid
        if grid is not None:
            offset = None if grid.offset_OG is None else grid.offset_OG.to(device)
            grid = Grid(grid.step_OG.to(device), offset, {n: t.to(device) for n, t in grid.stored.items()})
        return replace(self, rounded=Rounded(codes, grid))

    @property
    def parts(self) -> Tensors:
        """What files hold of it, by the suffix of the names; see `Format.pack`."""
        return format_of(self.form).pack(self.rounded)


Matrices = dict[str, Matrix]


def write_matrices(matrices: Mapping[str, Matrix], path: Path) -> None:
    """Write a file; none where there are no matrices."""
    if not matrices:
        return
    tensors: dict[str, torch.Tensor] = {}
    for name, matrix in matrices.items():
        codes, grid = matrix.rounded.codes_OI, matrix.rounded.grid
        tensors[f"{name}:codes"] = codes if grid is None else codes.to(torch.int8)
        if (stack := matrix.stack) is not None:
            tensors[f"{name}:stack"] = torch.tensor([stack.experts, stack.is_transposed])
        if grid is None:
            continue
        tensors[f"{name}:step"] = grid.step_OG
        if grid.offset_OG is not None:
            tensors[f"{name}:offset"] = grid.offset_OG
        tensors |= {f"{name}:stored.{part}": tensor for part, tensor in grid.stored.items()}
    forms = {name: matrix.form for name, matrix in matrices.items()}
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=forms)


def read_matrices(path: Path) -> Matrices:
    """What `write_matrices` wrote; nothing where there is no file."""
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        forms = file.metadata()
    tensors = load_file(path)
    found: Matrices = {}
    for name, form in forms.items():
        parts = {key.removeprefix(f"{name}:"): t for key, t in tensors.items() if key.startswith(f"{name}:")}
        codes = parts.pop("codes")
        stack = Stack(int(shape[0]), bool(shape[1])) if (shape := parts.pop("stack", None)) is not None else None
        if "step" not in parts:
            found[name] = Matrix(form, Rounded(codes), stack)
            continue
        step, offset = parts.pop("step"), parts.pop("offset", None)
        stored = {part.removeprefix("stored."): tensor for part, tensor in parts.items()}
        found[name] = Matrix(form, Rounded(codes.to(torch.int16), Grid(step, offset, stored)), stack)
    return found


def put(model: PreTrainedModel, matrices: Mapping[str, Matrix]) -> None:
    """Give a model the weights that engines read of `matrices`, in place; what it shares with another is replaced."""
    for name, matrix in matrices.items():
        holder, _, part = name.rpartition(".")
        module = model.get_submodule(holder)
        setattr(module, part, parameter_of(matrix, getattr(module, part)))
    model.tie_weights()


def parameter_of(matrix: Matrix, like: torch.Tensor) -> nn.Parameter:
    """The weight that engines read, in the precision and on the device of another."""
    return nn.Parameter(matrix.weight.to(like), requires_grad=False)
