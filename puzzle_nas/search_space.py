"""The variants that each slot of each layer may become. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from puzzle_nas.architecture import Architecture, Choice
from puzzle_nas.errors import RecipeError
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.specs import Head, Linear, NoOp, Offer, ParentsOwn, Spec


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
