"""What each way of serving can hold, variant by variant. No torch: search asks it, exporters refuse by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_nas.architecture import (
    SPEC_KINDS,
    GatedFFN,
    GroupedAttention,
    NoOpAttention,
    NoOpFFN,
    ParentShape,
    SearchSpace,
    Spec,
)


@dataclass(frozen=True)
class Server:
    """One way of serving."""

    label: str
    """As messages call it."""
    kinds: frozenset[type[Spec]] = frozenset(SPEC_KINDS.values())
    first_layer_needs_attention: bool = False

    def refusal(self, layer: int, spec: Spec) -> str | None:
        """Why `spec` cannot stand in `layer`, or None where it can."""
        if type(spec) not in self.kinds:
            return f"{self.label} has no {spec.id}"
        if self.first_layer_needs_attention and layer == 0 and isinstance(spec, NoOpAttention):
            return f"{self.label} needs attention in the first layer"
        return None


SERVERS = {
    "transformers": Server("transformers with our modelling code"),
    "vllm": Server("vLLM with our plugin"),
    "vllm-stock": Server(
        "stock vLLM", frozenset({GroupedAttention, NoOpAttention, GatedFFN, NoOpFFN}), first_layer_needs_attention=True
    ),
    "llama.cpp": Server("llama.cpp"),
}


def servable_space(space: SearchSpace, shape: ParentShape, servers: Sequence[str]) -> SearchSpace:
    """The variants that every one of `servers` (keys of `SERVERS`) can hold; the parent's own stay."""

    def fits(layer: int, spec: Spec) -> bool:
        is_parents = spec == shape.parent_spec(spec.slot)
        return is_parents or all(SERVERS[name].refusal(layer, spec) is None for name in servers)

    return SearchSpace(
        tuple(
            {slot: tuple(spec for spec in specs if fits(layer, spec)) for slot, specs in options.items()}
            for layer, options in enumerate(space.options)
        )
    )
