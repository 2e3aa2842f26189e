"""What may stand in a slot of a layer. Plain data, no torch.

A slot is a place in a layer ("attention", "ffn", ...). A spec says what stands there; each kind of spec is one frozen
class that owns its fields and says what alternatives it offers. How the matrices of a sub-block are stored is part of
its spec. `spec.id` is a label for files, tables and people: nobody parses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from puzzle_nas.errors import RecipeError


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
