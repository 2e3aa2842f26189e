"""What formats made for Llama hold of its relatives."""

from __future__ import annotations

from puzzle_nas.exporters.base import Child
from puzzle_nas.specs import GroupedAttention, WindowAttention

FAMILIES = ("llama", "mistral", "qwen2")
"""Those whose layers are Llama's but for biases and windows; Qwen 3 has norms on queries and keys."""


def problems(child: Child, format_name: str) -> list[str]:
    """What of a child such a format lacks, each a clause."""
    windows = any(
        spec.window for _, _, spec in child.architecture if isinstance(spec, GroupedAttention | WindowAttention)
    )
    return [f"it has a sliding window, which {format_name} lacks"] if windows else []


def has_bias(child: Child, matrix: str) -> bool:
    """Whether any layer has a bias beside a matrix such as `self_attn.q_proj`."""
    return any(name.endswith(f"{matrix}.bias") for name in child.model.state_dict())
