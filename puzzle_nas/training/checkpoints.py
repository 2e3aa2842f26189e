"""What an interrupted training goes on from: tensors, the step, and a checksum of both in one file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from puzzle_nas.artifacts import write_bytes
from puzzle_nas.progress import console


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Write tensors, from any device, and the step to continue with."""
    kept = {name: w.detach().cpu().contiguous().clone() for name, w in tensors.items()}
    write_bytes(path, safetensors.torch.save(kept, {"step": str(step), "checksum": _checksum(kept, step)}))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], int] | None:
    """Tensors on the CPU and the step; None where there is no file, or only a damaged one, which is deleted."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(facts["step"])
        if facts["checksum"] == _checksum(tensors, step):
            return tensors, step
    except (SafetensorError, KeyError, ValueError):
        pass
    console.print(f"  The checkpoint {path} is damaged; what it was for is trained anew.")
    path.unlink()
    return None


def _checksum(tensors: Mapping[str, torch.Tensor], step: int) -> str:
    value = zlib.crc32(str(step).encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return str(value)
