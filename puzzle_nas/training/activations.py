"""The parent's activations of one layer over many tokens, in memory-mapped files.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from puzzle_nas.artifacts import explained_disk_errors
from puzzle_nas.modeling import PuzzleForCausalLM

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


class LayerActivations:
    """Walks the parent upwards over fixed tokens and keeps what the present layer (-1: none yet) receives and adds.

    `x` is the block's input, `attention` and `ffn` what its sub-blocks add to the residual stream: the block's
    output is x + attention + ffn. Differences are kept, not sums, so that massive activations cost no precision.
    """

    def __init__(self, parent: PuzzleForCausalLM, tokens_ST: torch.Tensor, folder: Path):
        self.parent, self.folder = parent, folder
        self.layer = -1
        shape = (*tokens_ST.shape, parent.config.hidden_size)
        self.x, self.attention, self.ffn = (
            ActivationFile(folder / f"{name}.bin", shape, parent.dtype) for name in ("x", "attention", "ffn")
        )
        self.step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        with torch.inference_mode():
            for start in range(0, len(tokens_ST), self.step):
                batch = slice(start, start + self.step)
                self.x.tensor[batch] = parent.model.embed_tokens(tokens_ST[batch].to(parent.device)).cpu()
            example = self.x.tensor[:1].to(parent.device)
        self.inputs = parent.model.layer_inputs(example)

    def climb_to(self, layer: int) -> None:
        """Go up to a layer, computing those on the way, and fill `attention` and `ffn` there."""
        while self.layer < layer:
            if self.layer >= 0:
                self.advance()
            self.layer += 1
            self.compute(self.layer)

    @torch.inference_mode()
    def compute(self, layer: int) -> None:
        """Fill `attention` and `ffn` of a layer, whose input `x` already is."""
        block = self.parent.model.layers[layer]
        masks = {**self.inputs, "attention_mask": self.inputs["attention_mask"].get(block.layer_type)}
        for start in range(0, self.x.shape[0], self.step):
            batch = slice(start, start + self.step)
            x = self.x.tensor[batch].to(self.parent.device)
            attention = block.self_attn(block.input_layernorm(x), **masks)[0]
            self.attention.tensor[batch] = attention.cpu()
            self.ffn.tensor[batch] = block.mlp(block.post_attention_layernorm(x + attention)).cpu()

    @torch.inference_mode()
    def advance(self) -> None:
        """Turn the layer's output into the next one's input."""
        for start in range(0, self.x.shape[0], self.step):
            batch = slice(start, start + self.step)
            x = self.x.tensor[batch]
            self.x.tensor[batch] = (x + self.attention.tensor[batch]) + self.ffn.tensor[batch]

    def delete(self) -> None:
        """Free the disk."""
        for file in (self.x, self.attention, self.ffn):
            file.delete()
