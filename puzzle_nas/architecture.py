"""What a child is: one variant per layer and slot. Plain data, no torch.

A slot is a place in every layer ("attention", "ffn"). A spec says what stands there; each kind of spec is one
frozen class that owns its fields. `spec.id` is a label for files, tables and people: nobody parses it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from puzzle_nas.errors import RecipeError

SLOTS = ("attention", "ffn")


@dataclass(frozen=True)
class Spec:
    """One variant of one slot. Final subclasses set `slot` and `kind` and own their fields."""

    slot: ClassVar[str]
    kind: ClassVar[str]
    empty: ClassVar[bool] = False
    """Whether nothing is left to run."""

    @property
    def id(self) -> str:
        """A label such as `attention.kv2` or `ffn.linear`."""
        return f"{self.slot}.{self.kind}"

    def layer_config(self) -> dict[str, Any]:
        """The `per_layer_config` entries (transformers' convention) that describe this variant."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `spec_from_dict`."""
        return {"slot": self.slot, "kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class GroupedAttention(Spec):
    """Softmax attention with `num_key_value_heads` key-value heads (Puzzle, section 2)."""

    slot: ClassVar[str] = "attention"
    kind: ClassVar[str] = "grouped"
    num_key_value_heads: int

    @property
    def id(self) -> str:
        """`attention.kv2` for two key-value heads."""
        return f"attention.kv{self.num_key_value_heads}"

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"num_key_value_heads": self.num_key_value_heads}


@dataclass(frozen=True)
class LinearAttention(Spec):
    """One matrix in place of attention: no cache, no mixing of tokens."""

    slot: ClassVar[str] = "attention"
    kind: ClassVar[str] = "linear"

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"attention_linear": True}


@dataclass(frozen=True)
class NoOpAttention(Spec):
    """Attention and its norm left out."""

    slot: ClassVar[str] = "attention"
    kind: ClassVar[str] = "no_op"
    empty: ClassVar[bool] = True

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"skip": ["attention"]}


@dataclass(frozen=True)
class GatedFFN(Spec):
    """A gated FFN of `intermediate_size` channels."""

    slot: ClassVar[str] = "ffn"
    kind: ClassVar[str] = "gated"
    intermediate_size: int

    @property
    def id(self) -> str:
        """`ffn.w768` for 768 channels."""
        return f"ffn.w{self.intermediate_size}"

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"intermediate_size": self.intermediate_size}


@dataclass(frozen=True)
class LinearFFN(Spec):
    """One matrix in place of the FFN."""

    slot: ClassVar[str] = "ffn"
    kind: ClassVar[str] = "linear"

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"mlp_linear": True}


@dataclass(frozen=True)
class NoOpFFN(Spec):
    """FFN and its norm left out."""

    slot: ClassVar[str] = "ffn"
    kind: ClassVar[str] = "no_op"
    empty: ClassVar[bool] = True

    def layer_config(self) -> dict[str, Any]:
        """See `Spec.layer_config`."""
        return {"skip": ["mlp"]}


SPEC_KINDS: dict[tuple[str, str], type[Spec]] = {
    (cls.slot, cls.kind): cls
    for cls in (GroupedAttention, LinearAttention, NoOpAttention, GatedFFN, LinearFFN, NoOpFFN)
}


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The inverse of `Spec.to_dict`."""
    fields = {key: value for key, value in data.items() if key not in ("slot", "kind")}
    return SPEC_KINDS[data["slot"], data["kind"]](**fields)


@dataclass(frozen=True)
class ParentShape:
    """The sizes of a parent that decide which variants exist and what they weigh.

    `attention_bias` etc. are not here: bytes are counted on real tensors, never from formulas.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def parent_spec(self, slot: str) -> Spec:
        """The parent's own variant of `slot`."""
        if slot == "attention":
            return GroupedAttention(self.num_key_value_heads)
        return GatedFFN(self.intermediate_size)


@dataclass(frozen=True)
class Architecture:
    """One spec per layer and slot: `layers[3]["ffn"]`."""

    layers: tuple[Mapping[str, Spec], ...]

    def __iter__(self) -> Iterator[tuple[int, str, Spec]]:
        for layer, block in enumerate(self.layers):
            for slot in SLOTS:
                yield layer, slot, block[slot]

    def replaced(self, layer: int, spec: Spec) -> Architecture:
        """A copy with one sub-block changed."""
        blocks = list(self.layers)
        blocks[layer] = {**blocks[layer], spec.slot: spec}
        return Architecture(tuple(blocks))

    def without(self, layers: Container[int]) -> Architecture:
        """A copy that lacks whole layers."""
        gone = {spec.slot: spec for spec in (NoOpAttention(), NoOpFFN())}
        return Architecture(tuple(gone if i in layers else block for i, block in enumerate(self.layers)))

    def per_layer_config(self) -> dict[int, dict[str, Any]]:
        """transformers' `per_layer_config` for the child's config."""
        result: dict[int, dict[str, Any]] = {}
        for layer, block in enumerate(self.layers):
            merged: dict[str, Any] = {}
            for slot in SLOTS:
                entry = block[slot].layer_config()
                skip = merged.pop("skip", []) + entry.pop("skip", [])
                merged.update(entry)
                if skip:
                    merged["skip"] = skip
            result[layer] = merged
        return result

    def to_list(self) -> list[dict[str, Any]]:
        """JSON form: `[{"layer": 0, "attention": {...}, "ffn": {...}}, ...]`."""
        return [
            {"layer": layer, **{slot: block[slot].to_dict() for slot in SLOTS}}
            for layer, block in enumerate(self.layers)
        ]

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> Architecture:
        """The inverse of `to_list`."""
        return cls(tuple({slot: spec_from_dict(row[slot]) for slot in SLOTS} for row in data))

    @classmethod
    def of_parent(cls, shape: ParentShape) -> Architecture:
        """Every layer as in the parent."""
        block = {slot: shape.parent_spec(slot) for slot in SLOTS}
        return cls((block,) * shape.num_hidden_layers)


Choice: TypeAlias = tuple[int, tuple[Spec, ...]]
"""A layer, and the specs that are chosen there together: of one slot, or of all."""


def choice_id(specs: Sequence[Spec]) -> str:
    """A label such as `ffn.w768`, or `attention.kv1+ffn.w768`."""
    return "+".join(spec.id for spec in specs)


@dataclass(frozen=True)
class SearchSpace:
    """The variants of every layer and slot, the parent's own first: `options[3]["ffn"]`."""

    options: tuple[Mapping[str, tuple[Spec, ...]], ...]

    def __iter__(self) -> Iterator[tuple[int, str, Spec]]:
        for layer, slots in enumerate(self.options):
            for slot in SLOTS:
                for spec in slots[slot]:
                    yield layer, slot, spec

    def choices(self, by_block: bool = False) -> Iterator[Choice]:
        """What can be chosen where: every sub-block, or every pair of a layer's two."""
        for layer, slots in enumerate(self.options):
            if by_block:
                yield from ((layer, specs) for specs in itertools.product(*(slots[slot] for slot in SLOTS)))
            else:
                yield from ((layer, (spec,)) for slot in SLOTS for spec in slots[slot])

    def kinds(self) -> list[Spec]:
        """Every distinct spec, in order of first appearance."""
        return list(dict.fromkeys(spec for _, _, spec in self))


@dataclass(frozen=True)
class Scenario:
    """Traffic that the child must serve: one batch of requests of equal shape.

    The first of `decode_tokens` comes out of the prefill; the others take one decode step each.
    """

    name: str
    batch_size: int
    prefill_tokens: int
    decode_tokens: int
    weight: float = 1.0

    @property
    def decode_steps(self) -> int:
        """Forward passes after the prefill."""
        return self.decode_tokens - 1

    @property
    def total_tokens(self) -> int:
        """Tokens in the KV cache of one sequence when the last token has come out."""
        return self.prefill_tokens + self.decode_tokens


def round_width(fraction: float, intermediate_size: int, multiple_of: int) -> int:
    """The FFN width nearest to `fraction` of the parent's that is a multiple of `multiple_of`, at least one."""
    return max(multiple_of, round(fraction * intermediate_size / multiple_of) * multiple_of)


def build_search_space(
    shape: ParentShape,
    kv_heads: Sequence[int] | None,
    width_fractions: Sequence[float],
    multiple_of: int,
    linear: Mapping[str, bool],
    no_op: Mapping[str, bool],
    layers: Mapping[int, Sequence[str]],
) -> SearchSpace:
    """All variants of every layer.

    Args:
        kv_heads: KV-head counts besides the parent's; None means every smaller divisor.
        width_fractions: FFN widths as fractions of the parent's, rounded to `multiple_of`.
        linear, no_op: by slot, whether that variant is offered.
        layers: variant ids allowed in a layer besides the parent's own; layers not named keep all.

    Raises:
        RecipeError: a KV-head count that does not divide, a layer or variant that does not exist.
    """
    parent_kv = shape.num_key_value_heads
    if kv_heads is None:
        kv_heads = [n for n in range(parent_kv - 1, 0, -1) if parent_kv % n == 0]
    for n in kv_heads:
        if n < 1 or parent_kv % n:
            divisors = ", ".join(str(d) for d in range(1, parent_kv + 1) if parent_kv % d == 0)
            raise RecipeError(
                f"search_space.kv_heads: {n} does not divide the parent's {parent_kv} KV heads; choose from {divisors}."
            )
    attention: list[Spec] = [GroupedAttention(n) for n in dict.fromkeys([parent_kv, *kv_heads])]
    widths = [round_width(f, shape.intermediate_size, multiple_of) for f in width_fractions]
    widths = [w for w in widths if w < shape.intermediate_size]
    ffn: list[Spec] = [GatedFFN(w) for w in dict.fromkeys([shape.intermediate_size, *widths])]
    for specs, slot, linear_spec, no_op_spec in (
        (attention, "attention", LinearAttention(), NoOpAttention()),
        (ffn, "ffn", LinearFFN(), NoOpFFN()),
    ):
        if linear[slot]:
            specs.append(linear_spec)
        if no_op[slot]:
            specs.append(no_op_spec)
    full = {"attention": tuple(attention), "ffn": tuple(ffn)}
    known = {spec.id for specs in full.values() for spec in specs}
    options = [full] * shape.num_hidden_layers
    for layer, allowed in layers.items():
        if not 0 <= layer < shape.num_hidden_layers:
            raise RecipeError(
                f"search_space.layers: layer {layer} does not exist: the parent has "
                f"{shape.num_hidden_layers} layers (0-{shape.num_hidden_layers - 1})."
            )
        if unknown := sorted(set(allowed) - known):
            raise RecipeError(
                f"search_space.layers: layer {layer} names unknown variants {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}."
            )
        options[layer] = {
            slot: tuple(s for s in specs if s.id in allowed or s == shape.parent_spec(slot))
            for slot, specs in full.items()
        }
    return SearchSpace(tuple(options))
