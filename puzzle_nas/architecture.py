"""What a child is: one variant per layer and slot. Plain data, no torch.

A slot is a place in a layer ("attention", "ffn", ...); layers of one model may have different slots. A spec says what
stands there; each kind of spec is one frozen class that owns its fields and says what alternatives it offers. The
parent is an `Architecture` like its children. How the matrices of a sub-block are stored is part of its spec, and
embeddings with LM head are a slot of their own, outside of layers. `spec.id` is a label for files, tables and people:
nobody parses it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeVar

from puzzle_nas.errors import RecipeError
from puzzle_nas.formats.layout import layout_of


class Offer(Protocol):
    """What a search space asks for: `recipe.SearchSpaceSettings`, which explains each field."""

    kv_heads: list[int] | None
    windows: list[int]
    width_fractions: list[float]
    expert_counts: list[float]
    experts_per_token: list[float]
    formats: list[str]


@dataclass(frozen=True)
class Spec:
    """One variant of one slot. Final subclasses set `kind` and own their fields."""

    kind: ClassVar[str]
    empty: ClassVar[bool] = False
    """Whether nothing is left to run."""

    slot: str
    format: str | None = dataclasses.field(default=None, kw_only=True)
    """How its matrices are stored (`formats.layout.LAYOUTS`); None means in the model's precision."""

    @property
    def label(self) -> str:
        """What of `id` stands between slot and format."""
        return self.kind

    @property
    def id(self) -> str:
        """A label such as `attention.kv2`, `ffn.linear` or `ffn.w768@q4_0`."""
        return f"{self.slot}.{self.label}" + (f"@{self.format}" if self.format else "")

    @property
    def plain(self) -> Self:
        """The same, stored in the model's precision."""
        return self.stored(None)

    def stored(self, form: str | None) -> Self:
        """The same, stored in a format."""
        return dataclasses.replace(self, format=form)

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the layer's configuration that differ from the parent's, by transformers' names."""
        return {}

    def offers(self, asked: Offer) -> list[Spec]:
        """Cheaper variants that a parent's sub-block like this one can be made into.

        Raises:
            RecipeError: one that was asked for cannot be made.
        """
        return []

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: float) -> int:
        """Bytes that one sequence of so many tokens keeps in this layer's cache, `itemsize` for each number."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `spec_from_dict`."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "format" or value}
        return {"kind": self.kind, **fields}


@dataclass(frozen=True)
class GroupedAttention(Spec):
    """Softmax attention with `num_key_value_heads` key-value heads (Puzzle, section 2)."""

    kind: ClassVar[str] = "grouped"
    slot: str = dataclasses.field(default="attention", kw_only=True)
    num_key_value_heads: int
    window: int | None = None
    """Tokens that the parent's own layer sees at most."""

    @property
    def label(self) -> str:
        """`kv2` for two key-value heads."""
        return f"kv{self.num_key_value_heads}"

    @property
    def changes(self) -> dict[str, Any]:
        """See `Spec.changes`."""
        return {"num_key_value_heads": self.num_key_value_heads}

    def offers(self, asked: Offer) -> list[Spec]:
        """Fewer KV heads, and windows that are shorter than what the layer sees."""
        own, wanted = self.num_key_value_heads, asked.kv_heads
        divisors = [n for n in range(own, 0, -1) if own % n == 0]
        for n in wanted or ():
            if n not in divisors:
                raise RecipeError(
                    f"search_space.kv_heads: {n} does not divide the parent's {own} KV heads; choose from "
                    f"{', '.join(map(str, reversed(divisors)))}."
                )
        fewer = [n for n in dict.fromkeys(divisors if wanted is None else wanted) if n != own]
        windows = [w for w in dict.fromkeys(asked.windows) if self.window is None or w < self.window]
        return [
            *(dataclasses.replace(self, num_key_value_heads=n) for n in fewer),
            *(WindowAttention(w, own, slot=self.slot) for w in windows),
        ]

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: float) -> int:
        """Keys and values of every KV head, of the window where there is one."""
        return int(2 * self.num_key_value_heads * head_dim * itemsize * min(tokens, self.window or tokens))


@dataclass(frozen=True)
class WindowAttention(Spec):
    """The parent's attention, of the last `window` tokens only (Puzzle for MoE, arXiv 2602.11937)."""

    kind: ClassVar[str] = "window"
    slot: str = dataclasses.field(default="attention", kw_only=True)
    window: int
    num_key_value_heads: int

    @property
    def label(self) -> str:
        """`window1024`."""
        return f"window{self.window}"

    def cache_bytes(self, tokens: int, head_dim: int, itemsize: float) -> int:
        """Keys and values of the window."""
        return int(2 * self.num_key_value_heads * head_dim * itemsize * min(tokens, self.window))


@dataclass(frozen=True)
class GatedFFN(Spec):
    """A gated FFN of `intermediate_size` channels."""

    kind: ClassVar[str] = "gated"
    slot: str = dataclasses.field(default="ffn", kw_only=True)
    intermediate_size: int

    @property
    def label(self) -> str:
        """`w768` for 768 channels."""
        return f"w{self.intermediate_size}"

    @property
    def changes(self) -> dict[str, Any]:
        """See `Spec.changes`."""
        return {"intermediate_size": self.intermediate_size}

    def offers(self, asked: Offer) -> list[Spec]:
        """Fewer channels."""
        widths = [round_width(f, self.intermediate_size) for f in asked.width_fractions]
        return [dataclasses.replace(self, intermediate_size=w) for w in widths if w < self.intermediate_size]


@dataclass(frozen=True)
class Mixture(Spec):
    """A mixture of experts: a router sends each token to a few of them. Experts that all tokens share come on top."""

    kind: ClassVar[str] = "mixture"
    slot: str = dataclasses.field(default="experts", kw_only=True)
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Channels of one expert."""

    @property
    def label(self) -> str:
        """`64x768.top8` for 64 experts of 768 channels, 8 of them for a token."""
        return f"{self.num_experts}x{self.moe_intermediate_size}.top{self.num_experts_per_tok}"

    @property
    def changes(self) -> dict[str, Any]:
        """See `Spec.changes`."""
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        return {name: getattr(self, name) for name in names}

    def offers(self, asked: Offer) -> list[Spec]:
        """Fewer experts, fewer of them for a token, narrower ones: each alone."""
        all_experts, top_k, width = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        counts = [count_of(wanted, all_experts) for wanted in asked.expert_counts]
        fewer = [Mixture(n, min(top_k, n), width, slot=self.slot) for n in counts if n < all_experts]
        per_token = [count_of(wanted, top_k) for wanted in asked.experts_per_token]
        sparser = [dataclasses.replace(self, num_experts_per_tok=k) for k in per_token if k < top_k]
        widths = [round_width(fraction, width) for fraction in asked.width_fractions]
        narrower = [dataclasses.replace(self, moe_intermediate_size=w) for w in widths if w < width]
        return [*fewer, *sparser, *narrower]


@dataclass(frozen=True)
class ParentsOwn(Spec):
    """A mixer that is kept as it is or left out: nothing inside of it is searched."""

    kind: ClassVar[str] = "own"


@dataclass(frozen=True)
class Linear(Spec):
    """One matrix in place of a mixer: no cache, no mixing of tokens."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True)
class NoOp(Spec):
    """A mixer and its norm left out."""

    kind: ClassVar[str] = "no_op"
    empty: ClassVar[bool] = True


@dataclass(frozen=True)
class Head(Spec):
    """Embeddings and LM head: outside of layers, and only their format is searched."""

    kind: ClassVar[str] = "own"
    slot: str = dataclasses.field(default="head", kw_only=True)

    @property
    def id(self) -> str:
        """`head`, or `head@q8_0`."""
        return f"{self.slot}@{self.format}" if self.format else self.slot


KINDS: dict[str, type[Spec]] = {
    cls.kind: cls for cls in (GroupedAttention, WindowAttention, GatedFFN, Mixture, ParentsOwn, Linear, NoOp)
}


def spec_from_dict(data: Mapping[str, Any]) -> Spec:
    """The inverse of `Spec.to_dict`."""
    return KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})


Block: TypeAlias = Mapping[str, Spec]
"""What stands in each slot of a layer, in the order in which they run."""


@dataclass(frozen=True)
class Architecture:
    """One spec per layer and slot: `layers[3]["ffn"]`; and one for embeddings and LM head."""

    layers: tuple[Block, ...]
    head: Head = Head()

    def __iter__(self) -> Iterator[tuple[int, str, Spec]]:
        for layer, block in enumerate(self.layers):
            for slot, spec in block.items():
                yield layer, slot, spec

    @property
    def slots(self) -> tuple[str, ...]:
        """All slots of all layers, in order of first appearance."""
        return tuple(dict.fromkeys(slot for _, slot, _ in self))

    @property
    def groups(self) -> tuple[int, ...]:
        """For each layer, the first one that is like it: these cost the same."""
        return tuple(self.layers.index(block) for block in self.layers)

    @property
    def formats(self) -> tuple[str, ...]:
        """All formats that something is stored in, besides the model's precision."""
        specs = (self.head, *(spec for _, _, spec in self))
        return tuple(dict.fromkeys(spec.format for spec in specs if spec.format))

    def at(self, layer: int, slot: str) -> Spec:
        """What stands in a slot; the head's layer is the one behind the last."""
        return self.head if layer == len(self.layers) else self.layers[layer][slot]

    @property
    def plain(self) -> Architecture:
        """A copy stored in the model's precision."""
        return self.stored(None)

    def stored(self, form: str | None) -> Architecture:
        """A copy stored in one format throughout."""
        blocks = ({slot: s if s.empty else s.stored(form) for slot, s in block.items()} for block in self.layers)
        return Architecture(tuple(blocks), self.head.stored(form))

    def replaced(self, layer: int, spec: Spec) -> Architecture:
        """A copy with one sub-block, or the head, changed."""
        if isinstance(spec, Head):
            return dataclasses.replace(self, head=spec)
        blocks = list(self.layers)
        blocks[layer] = {**blocks[layer], spec.slot: spec}
        return dataclasses.replace(self, layers=tuple(blocks))

    def without(self, layers: Container[int]) -> Architecture:
        """A copy that lacks whole layers."""
        blocks = (
            {slot: NoOp(slot) for slot in block} if index in layers else block
            for index, block in enumerate(self.layers)
        )
        return dataclasses.replace(self, layers=tuple(blocks))

    def to_list(self) -> list[dict[str, Any]]:
        """JSON form: `[{"layer": 0, "attention": {...}, "ffn": {...}}, ...]`; a head in a format is the last entry."""
        rows: list[dict[str, Any]] = [
            {"layer": layer, **{slot: spec.to_dict() for slot, spec in block.items()}}
            for layer, block in enumerate(self.layers)
        ]
        return [*rows, {"head": {"format": self.head.format}}] if self.head.format else rows

    @classmethod
    def from_list(cls, data: Sequence[Mapping[str, Any]]) -> Architecture:
        """The inverse of `to_list`."""
        blocks = (
            {slot: spec_from_dict(entry) for slot, entry in row.items() if slot != "layer"}
            for row in data
            if "head" not in row
        )
        heads = [Head(**row["head"]) for row in data if "head" in row]
        return cls(tuple(blocks), *heads)


Choice: TypeAlias = tuple[int, tuple[Spec, ...]]
"""A layer, and the specs that are chosen there together: of one slot, or of all."""


def choice_id(specs: Sequence[Spec]) -> str:
    """A label such as `ffn.w768`, or `attention.kv1+ffn.w768`."""
    return "+".join(spec.id for spec in specs)


def plain(choice: Choice) -> Choice:
    """The same choice, stored in the model's precision."""
    layer, specs = choice
    return layer, tuple(spec.plain for spec in specs)


@dataclass(frozen=True)
class SearchSpace:
    """The variants of every layer and slot, the parent's own first: `options[3]["ffn"]`; and those of the head."""

    options: tuple[Mapping[str, tuple[Spec, ...]], ...]
    heads: tuple[Head, ...] = (Head(),)

    def __iter__(self) -> Iterator[tuple[int, str, Spec]]:
        for layer, slots in enumerate(self.options):
            for slot, specs in slots.items():
                for spec in specs:
                    yield layer, slot, spec

    @property
    def parent(self) -> Architecture:
        """Every layer as in the parent."""
        return Architecture(tuple({slot: specs[0] for slot, specs in slots.items()} for slots in self.options))

    @property
    def formats(self) -> tuple[str, ...]:
        """In which sub-blocks may be stored besides the model's precision."""
        return tuple(dict.fromkeys(spec.format for _, _, spec in self if spec.format))

    @property
    def quantised_parents(self) -> dict[str, Architecture]:
        """The parent in each format throughout, the head where it can be: `parent@q8_0`."""
        heads = {head.format: head for head in self.heads}
        return {
            f"parent@{form}": dataclasses.replace(self.parent.stored(form), head=heads.get(form, self.heads[0]))
            for form in self.formats
        }

    def choices(self, by_block: bool = False) -> Iterator[Choice]:
        """What can be chosen where: every sub-block, or every combination of a layer's."""
        for layer, slots in enumerate(self.options):
            if by_block:
                yield from ((layer, specs) for specs in itertools.product(*slots.values()))
            else:
                yield from ((layer, (spec,)) for specs in slots.values() for spec in specs)
        if len(self.heads) > 1:
            yield from ((len(self.options), (head,)) for head in self.heads)

    def own(self, layer: int, slot: str) -> Spec:
        """The parent's."""
        return self.heads[0] if layer == len(self.options) else self.options[layer][slot][0]

    def is_parents(self, choice: Choice) -> bool:
        """Whether a choice leaves the parent as it is."""
        layer, specs = choice
        return all(spec == self.own(layer, spec.slot) for spec in specs)

    def is_made(self, layer: int, spec: Spec) -> bool:
        """Whether the library holds it: changed, or the parent's own in a format. The rest is put together of these."""
        own = self.own(layer, spec.slot)
        return spec != own and (spec.format is None or spec.plain == own)

    def variants(self, layer: int) -> list[Spec]:
        """What the library holds of a layer."""
        return [spec for specs in self.options[layer].values() for spec in specs if self.is_made(layer, spec)]

    def scored(self, by_block: bool = False) -> Iterator[Choice]:
        """What is measured in the parent: variants in its precision, and its own sub-blocks in each format."""
        for layer, specs in self.choices(by_block):
            if all(spec.format is None for spec in specs) and not self.is_parents((layer, specs)):
                yield layer, specs
        for layer, specs in self.choices():
            if specs[0].format and self.is_made(layer, specs[0]):
                yield layer, specs


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


WIDTH_MULTIPLE = 32
"""Widths of FFNs and experts are multiples of this: what processors multiply at once, and what a block of a format
holds."""


def round_width(fraction: float, intermediate_size: int) -> int:
    """The FFN width nearest to `fraction` of the parent's that is a multiple of WIDTH_MULTIPLE, and at least that.

    Parents narrower than eight times that have multiples of the largest power of two up to an eighth of their width.
    """
    multiple = min(WIDTH_MULTIPLE, 1 << max(0, (intermediate_size // 8).bit_length() - 1))
    return max(multiple, round(fraction * intermediate_size / multiple) * multiple)


def count_of(wanted: float, of_parent: int) -> int:
    """A number as recipes give it: below 1 a share of the parent's, at least one; else the number itself."""
    return int(wanted) if wanted >= 1 else max(1, round(wanted * of_parent))


def build_search_space(
    parent: Architecture,
    asked: Offer,
    linear: Container[str],
    no_op: Container[str],
    layers: Mapping[int, Sequence[str]],
) -> SearchSpace:
    """All variants of every layer: what the parent's own sub-blocks offer, one matrix, nothing; each in every format.

    Args:
        linear, no_op: slots in which these are offered; a mixer that is opaque becomes no matrix.
        layers: variant ids allowed in a layer besides the parent's own; layers not named keep all.

    Raises:
        RecipeError: a variant that cannot be made, a layer or variant that does not exist.
    """
    options: list[Mapping[str, tuple[Spec, ...]]] = []
    for block in parent.layers:
        slots = {}
        for slot, own in block.items():
            specs = [own, *own.offers(asked)]
            if slot in linear and not isinstance(own, ParentsOwn):
                specs.append(Linear(slot))
            if slot in no_op:
                specs.append(NoOp(slot))
            slots[slot] = tuple(in_formats(dict.fromkeys(specs), asked.formats))
        options.append(slots)
    for layer, allowed in layers.items():
        if not 0 <= layer < len(options):
            raise RecipeError(
                f"search_space.layers: layer {layer} does not exist: the parent has "
                f"{len(options)} layers (0-{len(options) - 1})."
            )
        known = {spec.id for specs in options[layer].values() for spec in specs}
        if unknown := sorted(set(allowed) - known):
            raise RecipeError(
                f"search_space.layers: layer {layer} names unknown variants {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}."
            )
        options[layer] = {
            slot: tuple(s for s in specs if s.plain == specs[0] or not {s.id, s.plain.id}.isdisjoint(allowed))
            for slot, specs in options[layer].items()
        }
    for_heads = [form for form in asked.formats if layout_of(form).heads]
    return SearchSpace(tuple(options), tuple(in_formats([parent.head], for_heads)))


S = TypeVar("S", bound=Spec)


def in_formats(specs: Iterable[S], formats: Sequence[str]) -> Iterator[S]:
    """Each of the specs in the model's precision, and then in every format; what is empty has none."""
    for spec in specs:
        yield spec
        if not spec.empty:
            yield from (spec.stored(form) for form in formats)
