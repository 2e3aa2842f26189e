"""What formats made for Llama hold of its relatives."""

from __future__ import annotations

from puzzle_nas.architecture import GroupedAttention, WindowAttention
from puzzle_nas.exporters.base import Child

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Those whose layers are Llama's but for biases, norms on queries and keys, and windows."""


def problems(child: Child, format_name: str) -> list[str]:
    """What of a child such a format lacks, each a clause."""
    names = child.model.state_dict()
    windows = any(
        spec.window for _, _, spec in child.architecture if isinstance(spec, GroupedAttention | WindowAttention)
    )
    found = {
        "norms on queries and keys": any(".q_norm." in name for name in names),
        "a sliding window": windows,
    }
    return [f"it has {what}, which {format_name} lacks" for what, is_so in found.items() if is_so]


def has_bias(child: Child, matrix: str) -> bool:
    """Whether any layer has a bias beside a matrix such as `self_attn.q_proj`."""
    return any(name.endswith(f"{matrix}.bias") for name in child.model.state_dict())
