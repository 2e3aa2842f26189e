"""What a report page is made from: the summary, and whatever else the run folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puzzle_nas.architecture import SLOTS, SPEC_KINDS, Architecture, ParentShape, Spec, spec_from_dict
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.costs import CostTable
from puzzle_nas.errors import PuzzleError
from puzzle_nas.recipe import Recipe


@dataclass(frozen=True)
class Library:
    """The facts of every trained variant, by layer and id."""

    num_layers: int
    specs: Mapping[str, Sequence[Spec]]
    """By slot: the parent's kind of sub-block first, by size, then the others."""
    initial: Mapping[tuple[int, str], Mapping[str, Any]]
    main: Mapping[tuple[int, str], Mapping[str, Any]]

    @classmethod
    def load(cls, run: RunFolder, num_layers: int) -> Library:
        """Read whatever facts there are."""
        found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {"initial": {}, "main": {}}
        size_of: dict[Spec, int] = {}
        for library, facts in found.items():
            for layer in range(num_layers):
                for path in sorted(run.variant(layer, "any", library).parent.glob("*.json")):
                    fact = read_json(path)
                    spec = spec_from_dict(fact["spec"])
                    facts[layer, spec.id] = fact
                    size_of.setdefault(spec, fact["parameters"])
        kinds = list(SPEC_KINDS)
        specs = sorted(size_of, key=lambda spec: (kinds.index((spec.slot, spec.kind)), -size_of[spec]))
        by_slot = {slot: [spec for spec in specs if spec.slot == slot] for slot in SLOTS}
        return cls(num_layers, by_slot, found["initial"], found["main"])

    def values(self, spec: Spec, key: str) -> list[Any]:
        """One fact of a variant after BLD in every layer, None where there is none."""
        return [self.main.get((layer, spec.id), {}).get(key) for layer in range(self.num_layers)]


@dataclass(frozen=True)
class Facts:
    """One run. What its folder lacks is None, and the section that wants it says so in a sentence."""

    recipe: Recipe
    run: RunFolder
    summary: Mapping[str, Any]

    @cached_property
    def library(self) -> Library:
        """See `Library`; empty where there is none."""
        return Library.load(self.run, len(self.summary["architecture"]))

    @cached_property
    def shape(self) -> ParentShape | None:
        """The parent's sizes."""
        return ParentShape(**read_json(self.run.parent)["shape"]) if self.run.parent.exists() else None

    @cached_property
    def child(self) -> Architecture | None:
        """The run's child."""
        path = self.run.architecture()
        return Architecture.from_list(read_json(path)["architecture"]) if path.exists() else None

    @cached_property
    def costs(self) -> CostTable | None:
        """The cost table."""
        return CostTable.load(self.run, self.recipe) if self.run.costs(self.recipe.engine).exists() else None

    @cached_property
    def tables(self) -> ArchitectureSearch | None:
        """Scores and costs as a search problem."""
        try:
            return ArchitectureSearch.load(self.recipe, self.run)
        except PuzzleError:
            return None

    def percent_of_parent(self, row: Mapping[str, Any], slot: str) -> float:
        """Runtime of one sub-block of the child relative to the parent's own; `row` is of `summary.architecture`."""
        return percent_of_parent(self.summary, row, slot)

    def file(self, name: str) -> Any:
        """The JSON of one file of the run, None where there is none."""
        return read_json(self.run / name) if (self.run / name).exists() else None


def percent_of_parent(summary: Mapping[str, Any], row: Mapping[str, Any], slot: str) -> float:
    """Runtime of one sub-block of a child relative to the parent's own, in percent."""
    full = summary["parent_share_of_runtime"][slot]
    return 100 * row[f"{slot}_share_of_parent_runtime"] / full if full else 0.0
