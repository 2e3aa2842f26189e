"""Packed blocks as tensors, and the order in which training walks through them."""

# N blocks in a split, T tokens in a block

from __future__ import annotations

import hashlib

import safetensors.torch
import torch
from safetensors import SafetensorError

from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.errors import ArtifactError, puzzle_command


def load_tokens(run: RunFolder, split: str) -> torch.Tensor:
    """One split as an int64 tensor [N, T].

    Raises:
        ArtifactError: the split is missing, or not what prepare-data wrote.
    """
    path = run.split(split)
    facts = read_json(run / "data" / "data.json") if (run / "data" / "data.json").exists() else None
    if facts is None or not path.exists():
        raise ArtifactError(f"{run} has no {split} text yet. Make it with: {puzzle_command('prepare-data', run)}")
    damaged = ArtifactError(
        f"{path} is corrupted. Make it again with: {puzzle_command('prepare-data', run, '--again')}"
    )
    try:
        tokens_NT = safetensors.torch.load(path.read_bytes())["tokens"]
    except (SafetensorError, KeyError):
        raise damaged from None
    if hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest() != facts["splits"][split]["fingerprint"]:
        raise damaged
    return tokens_NT.long()


def block_order(num_blocks: int, wanted: int, seed: int) -> torch.Tensor:
    """Which blocks come in which order, int64 [wanted]: shuffled epochs, each block once in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-wanted // num_blocks)
    orders = [torch.randperm(num_blocks, generator=generator) for _ in range(epochs)]
    return torch.cat(orders)[:wanted] if orders else torch.empty(0, dtype=torch.int64)
