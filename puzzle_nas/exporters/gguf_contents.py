"""What a GGUF file holds besides its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from gguf import GGUFWriter

Tensors: TypeAlias = dict[str, tuple[torch.Tensor, str | None]]
"""By GGUF's names: weights, or the bytes of those that are stored in formats; and the format of those that have one."""


@dataclass(frozen=True)
class Contents:
    """A model in the terms of one of llama.cpp's architectures."""

    architecture: str
    """llama.cpp's name of it."""
    write_sizes: Callable[[GGUFWriter], None]
    """Adds the fields from which llama.cpp knows its sizes."""
    tensors: Tensors
