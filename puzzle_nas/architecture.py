"""What a child is: one spec for each slot of each layer, and one for embeddings and LM head. Plain data, no torch.

The parent is an `Architecture` like its children. Layers of one model may have different slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from puzzle_nas.specs import Head, NoOp, Spec, spec_from_dict

Block: TypeAlias = Mapping[str, Spec]
"""What stands in each slot of a layer, in the order in which they run."""


@dataclass(frozen=True)
class Architecture:
    """One spec per layer and slot: `layers[3]["ffn"]`; and one for embeddings and LM head."""

    layers: tuple[Block, ...]
    head: Head = dataclasses.field(default_factory=Head)

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
