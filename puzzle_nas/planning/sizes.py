"""What a parent and the variants of its sub-blocks hold and compute for a token. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from puzzle_nas.architecture import Architecture
from puzzle_nas.choosing.cost_fit import Part
from puzzle_nas.specs import Spec


@dataclass(frozen=True)
class Size:
    """One sub-block, or several added up."""

    parameters: int = 0
    multiplied: int = 0
    """Numbers in the matrices that a token is multiplied with: of a mixture, its experts alone."""
    made: int = 0
    """Numbers that these products give for a token."""
    attended: int = 0
    """Query heads times their width, where tokens attend to each other."""
    cached: int = 0
    """Keys and values that a token leaves in the cache, in numbers; windows are not looked at."""

    def __add__(self, other: Size) -> Size:
        return Size(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class ModelSize:
    """A parent, and what its layers may become."""

    architecture: Architecture
    hidden: int
    vocabulary: int
    fixed_parameters: int
    """Embeddings, final norm and LM head, tied weights once."""
    subblocks: Mapping[Part, Size]
    last_inputs: Mapping[Part, int]
    """Width of what a sub-block's last matrix receives; 0 where there is none."""

    @cached_property
    def _groups(self) -> tuple[int, ...]:
        return self.architecture.groups

    def of(self, layer: int, spec: Spec) -> Size:
        """A variant, or the parent's own sub-block, in a layer."""
        return self.subblocks[Part(self._groups[layer], spec)]

    def last_input(self, layer: int, spec: Spec) -> int:
        """See `last_inputs`."""
        return self.last_inputs[Part(self._groups[layer], spec)]

    @cached_property
    def layers(self) -> list[Size]:
        """The parent's own, each with all its slots."""
        return [
            sum((self.of(i, s) for s in block.values()), Size()) for i, block in enumerate(self.architecture.layers)
        ]

    @cached_property
    def body(self) -> Size:
        """All layers of the parent."""
        return sum(self.layers, Size())

    @cached_property
    def above(self) -> list[Size]:
        """For each layer of the parent, all that are above it, added up."""
        sums = [Size()]
        for size in reversed(self.layers[1:]):
            sums.append(sums[-1] + size)
        return sums[::-1]

    @property
    def parameters(self) -> int:
        """All of the parent."""
        return self.fixed_parameters + self.body.parameters
