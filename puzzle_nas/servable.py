"""What each way of serving can hold, variant by variant. No torch: search asks it, exporters refuse by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from puzzle_nas.formats.layout import LAYOUTS, layout_of
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import KINDS, GatedFFN, GroupedAttention, Head, Linear, NoOp, Spec, WindowAttention


@dataclass(frozen=True)
class Server:
    """One way of serving."""

    label: str
    """As messages call it."""
    kinds: frozenset[type[Spec]] = frozenset(KINDS.values())
    own_layers: tuple[str, ...] = ()
    """Families of which it serves the parent's own layers only, in any of `formats`."""
    first_layer_needs_attention: bool = False
    formats: tuple[str, ...] = ()
    """In which it serves matrices besides the model's precision, the widest first."""
    kv_formats: Mapping[str, float] = field(default_factory=dict)
    """In which it can keep the KV cache, by its own names, with bytes a number."""

    def refusal(self, layer: int, spec: Spec, own: Spec, family: str) -> str | None:
        """Why `spec` cannot stand in `layer` of a child of `family` in place of the parent's `own`; None: it can."""
        if family in self.own_layers:
            if spec.plain != own:
                return f"{self.label} has layers of {family} in the parent's sizes only, and no {spec.plain.id}"
        elif type(spec) not in self.kinds and not isinstance(spec, Head):
            return f"{self.label} has no {spec.plain.id}"
        if self.first_layer_needs_attention and layer == 0 and spec == NoOp("attention"):
            return f"{self.label} needs attention in the first layer"
        if isinstance(spec, Head) and spec.format and not layout_of(spec.format).heads:
            return f"{self.label} has embeddings and LM head in the model's precision only"
        if spec.format and spec.format not in self.formats:
            return f"{self.label} has no {spec.format}"
        return None


SERVERS = {
    "transformers": Server("transformers with our modelling code", formats=tuple(LAYOUTS)),
    "vllm": Server(
        "vLLM with our plugin",
        frozenset({GroupedAttention, WindowAttention, GatedFFN, Linear, NoOp}),
        formats=("int8", "int4"),
        kv_formats={"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1},
    ),
    "vllm-stock": Server("stock vLLM", frozenset({GroupedAttention, GatedFFN, NoOp}), first_layer_needs_attention=True),
    "llama.cpp": Server(
        "llama.cpp",
        frozenset({GroupedAttention, GatedFFN, Linear, NoOp}),
        own_layers=("qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"),
        formats=("f16", "q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_1", "q4_0", "mxfp4"),
        kv_formats={
            **dict(f32=4, f16=2, bf16=2),
            **dict(q8_0=34 / 32, q5_1=24 / 32, q5_0=22 / 32, q4_1=20 / 32, q4_0=18 / 32),
        },
    ),
}
# The same, running models as they are written.
SERVERS["vllm-eager"] = SERVERS["vllm"]


def removes_whole_layers(engine: str, family: str) -> bool:
    """Whether nothing smaller can be removed from a parent of `family` on an engine."""
    return engine in SERVERS and family in SERVERS[engine].own_layers


def servable_space(space: SearchSpace, servers: Sequence[str], family: str) -> SearchSpace:
    """The variants that every one of `servers` (keys of `SERVERS`) can hold; the parent's own stay.

    Args:
        family: the parent's, by transformers' name.
    """

    def fits(layer: int, spec: Spec) -> bool:
        own = space.own(layer, spec.slot)
        return spec == own or all(SERVERS[name].refusal(layer, spec, own, family) is None for name in servers)

    return SearchSpace(
        tuple(
            {slot: tuple(spec for spec in specs if fits(layer, spec)) for slot, specs in options.items()}
            for layer, options in enumerate(space.options)
        ),
        tuple(head for head in space.heads if fits(len(space.options), head)),
    )
