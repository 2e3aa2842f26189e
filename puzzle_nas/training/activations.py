"""The parent's activations of one layer over many tokens, in memory-mapped files or in a GPU's memory.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.training import parallel

BATCH_TOKENS = 4096


class ActivationFile:
    """One [S, T, D] tensor in a file. It is scratch: made anew from the layer below whenever it is missing."""

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

    `x` is the block's input, `attention` and `ffn` what its sub-blocks add to the residual stream: the block's
    output is x + attention + ffn. Differences are kept, not sums, so that massive activations cost no precision.

    Args:
        first: the layer to begin below. Where that is not layer 0, its input comes from the rank before this one.
    """

    def __init__(self, parent: PuzzleForCausalLM, tokens_ST: torch.Tensor, folder: Path, first: int = 0):
        self.parent, self.folder, self.first = parent, folder, first
        self.layer = first - 1
        shape = (*tokens_ST.shape, parent.config.hidden_size)
        names = ("x", "attention", "ffn")
        needed = len(names) * math.prod(shape) * parent.dtype.itemsize
        on_gpu = parent.device.type == "cuda" and needed < parallel.share_of_memory(parent.device) / 2
        self.x, self.attention, self.ffn = (
            GPUActivations(shape, parent.dtype, parent.device)
            if on_gpu
            else ActivationFile(folder / f"{name}.bin", shape, parent.dtype)
            for name in names
        )
        self.device = self.x.tensor.device
        """Where they lie."""
        self.step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        with torch.inference_mode():
            if first:
                parallel.take_from_below(self.x.tensor.split(self.step))
            else:
                for x, batch in zip(self.x.tensor.split(self.step), tokens_ST.split(self.step), strict=True):
                    x.copy_(parent.model.embed_tokens(batch.to(parent.device)))
            example = self.x.tensor[:1].to(parent.device)
        self.inputs = parent.model.layer_inputs(example)

    def climb_to(self, layer: int) -> None:
        """Go up to a layer, computing those on the way, and fill `attention` and `ffn` there."""
        while self.layer < layer:
            if self.layer >= self.first:
                self.advance()
            self.layer += 1
            self.compute(self.layer)

    @torch.inference_mode()
    def compute(self, layer: int) -> None:
        """Fill `attention` and `ffn` of a layer, whose input `x` already is."""
        block = self.parent.model.layers[layer]
        for files in zip(*(file.tensor.split(self.step) for file in (self.x, self.attention, self.ffn)), strict=True):
            for file, added in zip(files[1:], self._added(block, files[0]), strict=True):
                file.copy_(added)

    def _added(self, block: PuzzleDecoderLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a block's attention and FFN add to the residual stream x, [B, T, D] each."""
        x = x.to(self.parent.device)
        masks = {**self.inputs, "attention_mask": self.inputs["attention_mask"].get(block.layer_type)}
        attention = block.self_attn(block.input_layernorm(x), **masks)[0]
        return attention, block.mlp(block.post_attention_layernorm(x + attention))

    @torch.inference_mode()
    def advance(self) -> None:
        """Turn the layer's output into the next one's input."""
        for start in range(0, self.x.shape[0], self.step):
            batch = slice(start, start + self.step)
            x = self.x.tensor[batch]
            self.x.tensor[batch] = (x + self.attention.tensor[batch]) + self.ffn.tensor[batch]

    @torch.inference_mode()
    def pass_on(self, layer: int) -> None:
        """Compute what a later layer receives and send it to the next rank; to be called before the climb begins."""
        # Nothing lies here yet, and x is needed again.
        stream = self.attention.tensor.copy_(self.x.tensor)
        for index in range(self.first, layer):
            block = self.parent.model.layers[index]
            for x in stream.split(self.step):
                attention, ffn = self._added(block, x)
                x.copy_((x + attention.to(x.device)) + ffn.to(x.device))
        parallel.pass_up(stream.split(self.step))

    def delete(self) -> None:
        """Free disk or memory."""
        for file in (self.x, self.attention, self.ffn):
            file.delete()
