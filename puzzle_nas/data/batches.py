"""Packed blocks as tensors, and the order in which training walks through them."""

# B blocks in a batch, N blocks in a split, T tokens in a block

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import safetensors.torch
import torch
from safetensors import SafetensorError

from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.errors import ArtifactError


def load_tokens(run: RunFolder, split: str) -> torch.Tensor:
    """One split as an int64 tensor [N, T].

    Raises:
        ArtifactError: the split is missing, or not what prepare-data wrote.
    """
    path = run.split(split)
    facts = read_json(run / "data" / "data.json") if (run / "data" / "data.json").exists() else None
    if facts is None or not path.exists():
        raise ArtifactError(f"{run} has no {split} text yet. Make it with: puzzle prepare-data {run}")
    damaged = ArtifactError(f"{path} is corrupted. Make it anew with: puzzle prepare-data {run} --again")
    try:
        tokens_NT = safetensors.torch.load(path.read_bytes())["tokens"]
    except (SafetensorError, KeyError):
        raise damaged from None
    if hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest() != facts["splits"][split]["fingerprint"]:
        raise damaged
    return tokens_NT.long()


def block_order(num_blocks: int, wanted: int, seed: int) -> torch.Tensor:
    """Which blocks come in which order, int64 [wanted]: shuffled epochs one after another, each block once in each."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-wanted // num_blocks)
    orders = [torch.randperm(num_blocks, generator=generator) for _ in range(epochs)]
    return torch.cat(orders)[:wanted] if orders else torch.empty(0, dtype=torch.int64)


def number_of_steps(num_tokens: int, batch_tokens: int, sequence_length: int) -> int:
    """Steps that take `num_tokens` (rounded up to whole steps), `batch_tokens` (down to whole blocks) in each."""
    return -(-num_tokens // (_batch_size(batch_tokens, sequence_length) * sequence_length))


def training_batches(
    tokens_NT: torch.Tensor, num_tokens: int, batch_tokens: int, seed: int, first_step: int = 0
) -> Iterator[torch.Tensor]:
    """Batches [B, T] from `first_step` on; they start over, shuffled anew, when the text has run out."""
    sequence_length = tokens_NT.shape[1]
    steps = number_of_steps(num_tokens, batch_tokens, sequence_length)
    size = _batch_size(batch_tokens, sequence_length)
    order = block_order(len(tokens_NT), steps * size, seed)
    for step in range(first_step, steps):
        yield tokens_NT[order[step * size : (step + 1) * size]]


def _batch_size(batch_tokens: int, sequence_length: int) -> int:
    return max(1, batch_tokens // sequence_length)
