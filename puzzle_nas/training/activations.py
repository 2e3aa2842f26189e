"""The parent's activations of one layer over many tokens, in memory-mapped files or in a GPU's memory.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.families import Anatomy
from puzzle_nas.training import parallel

BATCH_TOKENS = 4096


class ActivationFile:
    """One [S, T, D] tensor in a file. It is scratch: made again from the layer below whenever it is missing."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            size = math.prod(shape) * dtype.itemsize
            with open(path, "ab") as file:
                file.truncate(size)
                # A hole that the disk has no room for would end the process with SIGBUS when it is written.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
            self.tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    def delete(self) -> None:
        """Free the disk."""
        self.path.unlink(missing_ok=True)


class GPUActivations:
    """The same in a GPU's memory."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        self.shape = shape
        self.tensor = torch.empty(shape, dtype=dtype, device=device)

    def delete(self) -> None:
        """Free the memory."""
        del self.tensor


class LayerActivations:
    """Walks the parent upwards over fixed tokens and keeps what the present layer (-1: none yet) receives and adds.

    `x` is the block's input, `added` what each of its slots adds to the residual stream, in the order in which they
    run: the block's output is x plus all of them. Differences are kept, not sums, so that massive activations cost no
    precision.

    Args:
        windows: for which attention masks are needed besides the parent's own.
        first: the layer to begin below. Where that is not layer 0, its input comes from the rank before this one.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        tokens_ST: torch.Tensor,
        folder: Path,
        windows: Sequence[int] = (),
        first: int = 0,
    ):
        self.parent, self.parts, self.folder, self.first = parent, Anatomy(parent), folder, first
        self.layer = first - 1
        shape = (*tokens_ST.shape, parent.config.hidden_size)
        most_slots = max(len(self.parts.places(layer)) for layer in range(len(self.parts.layers)))
        needed = (1 + most_slots) * math.prod(shape) * parent.dtype.itemsize
        on_gpu = parent.device.type == "cuda" and needed < parallel.share_of_memory(parent.device) / 2
        self.x, *self._rooms = (
            GPUActivations(shape, parent.dtype, parent.device)
            if on_gpu
            else ActivationFile(folder / f"{name}.bin", shape, parent.dtype)
            for name in ("x", *(f"added_{place}" for place in range(most_slots)))
        )
        self.device = self.x.tensor.device
        """Where they lie."""
        self.step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        self.inputs = self.parts.inputs(tokens_ST.shape[1], windows)
        with torch.inference_mode():
            if first:
                parallel.take_from_below(self.x.tensor.split(self.step))
            else:
                for x, batch in zip(self.x.tensor.split(self.step), tokens_ST.split(self.step), strict=True):
                    x.copy_(self.parts.embed(batch.to(parent.device)))

    @property
    def added(self) -> dict[str, ActivationFile | GPUActivations]:
        """By slot of the present layer."""
        return dict(zip(self.parts.places(self.layer), self._rooms, strict=False))

    def climb_to(self, layer: int) -> None:
        """Go up to a layer, computing those on the way, and fill `added` there."""
        while self.layer < layer:
            if self.layer >= self.first:
                self.advance()
            self.layer += 1
            self.compute()

    @torch.inference_mode()
    def compute(self) -> None:
        """Fill `added` of the present layer, whose input `x` already is."""
        subblocks, rooms = self.parts.subblocks(self.layer).values(), self.added.values()
        for x, *files in zip(*(file.tensor.split(self.step) for file in (self.x, *rooms)), strict=True):
            hidden = x.to(self.parent.device)
            for subblock, file in zip(subblocks, files, strict=True):
                added = subblock.added(hidden, self.inputs[self.layer])
                file.copy_(added)
                hidden = hidden + added

    @torch.inference_mode()
    def advance(self) -> None:
        """Turn the layer's output into the next one's input."""
        for file in self.added.values():
            self.x.tensor.add_(file.tensor)

    @torch.inference_mode()
    def pass_on(self, layer: int) -> None:
        """Compute what a later layer receives and send it to the next rank; to be called before the climb begins."""
        # Nothing lies here yet, and x is needed again.
        stream = self._rooms[0].tensor.copy_(self.x.tensor)
        for index in range(self.first, layer):
            subblocks = self.parts.subblocks(index).values()
            for x in stream.split(self.step):
                hidden = x.to(self.parent.device)
                for subblock in subblocks:
                    hidden = hidden + subblock.added(hidden, self.inputs[index])
                x.copy_(hidden)
        parallel.pass_up(stream.split(self.step))

    def delete(self) -> None:
        """Free disk or memory."""
        for file in (self.x, *self._rooms):
            file.delete()
