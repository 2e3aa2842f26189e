"""Seconds that `examine` takes: on SmolLM2 (from its Python package) and on a checkpoint of 20 GB.

The large one is of sparse files: true headers of a Llama of 10B parameters in bfloat16, in five shards, and nothing
behind them; it takes no room on the disk. Its fingerprint reads all 20 GB once, so that is measured with --hash alone.
"""

from __future__ import annotations

import functools
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common import SMOLLM2, report
from puzzle_nas.families import find_checkpoint
from puzzle_nas.parents import Examined, examine, parent_fingerprint
from puzzle_nas.parents.fit import expected_tensors

LARGE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=42,
    num_attention_heads=32,
    num_key_value_heads=8,
    dtype=torch.bfloat16,
)
SHARDS = 5


def sparse_checkpoint(folder: Path, examined: Examined) -> Path:
    """A checkpoint of LARGE whose weights are holes, with another parent's tokenizer."""
    folder.mkdir()
    LARGE.save_pretrained(folder)
    examined.tokenizer.save_pretrained(folder)
    tensors = list(expected_tensors(LARGE).items())
    per_shard = -(-len(tensors) // SHARDS)
    weight_map = {}
    for number in range(SHARDS):
        name, header, end = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", {}, 0
        for tensor, shape in tensors[number * per_shard : (number + 1) * per_shard]:
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[tensor] = name
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def seconds(label: str, task: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """The least of several, on the clock and of the processor: on a machine that is busy the latter says more."""
    clock, processor = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        task()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return {f"{label}_seconds": min(clock), f"{label}_processor_seconds": min(processor)}


def main(hash: bool = False) -> None:
    """Print and keep the figures."""
    imports = "import time; t = time.perf_counter(); import puzzle_nas.parents; print(time.perf_counter() - t)"
    figures = {"import_seconds": float(subprocess.run([sys.executable, "-c", imports], capture_output=True).stdout)}
    with tempfile.TemporaryDirectory() as name:
        smollm2 = find_checkpoint(SMOLLM2, Path(name))
        assert isinstance(smollm2, Path)
        large = sparse_checkpoint(Path(name) / "large", examine(smollm2))
        gigabytes = sum(file.stat().st_size for file in large.iterdir()) / 1e9
        figures |= seconds("smollm2", lambda: examine(smollm2)) | seconds("large", lambda: examine(large))
        figures["large_gigabytes"] = gigabytes
        for label, where in {"smollm2": smollm2, **({"large": large} if hash else {})}.items():
            cache = Path(name) / "hashes.json"
            for look in ("first", "second"):
                task = functools.partial(parent_fingerprint, where, cache)
                figures |= seconds(f"{label}_fingerprint_{look}_look", task, repeats=1)
    report("examination", figures)
