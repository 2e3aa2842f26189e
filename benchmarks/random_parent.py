"""Writes a random parent of 1.2 billion parameters, with Llama 3.2 1B's sizes and SmolLM2's tokenizer, to FOLDER.

For what does not depend on weights, time and memory: python -m benchmarks plan benchmarks/random_1b.yaml runs/random_1b
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import SMOLLM2
from puzzle_nas.families import find_checkpoint
from puzzle_nas.parents import examine

SIZES = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


def main(folder: Path = Path("runs/random-1b-parent")) -> None:
    """See above."""
    torch.manual_seed(0)
    LlamaForCausalLM(SIZES).bfloat16().save_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        examine(find_checkpoint(SMOLLM2, Path(scratch))).tokenizer.save_pretrained(folder)
