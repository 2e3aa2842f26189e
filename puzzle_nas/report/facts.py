"""What a report page is made from: the summary, and whatever else the run folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch, parent_of
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.errors import PuzzleError
from puzzle_nas.recipe import Recipe
from puzzle_nas.specs import KINDS, Spec, spec_from_dict


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
                    if spec.format:
                        continue
                    facts[layer, spec.id] = fact
                    size_of.setdefault(spec, fact["parameters"])
        kinds = list(KINDS)
        specs = sorted(size_of, key=lambda spec: (kinds.index(spec.kind), -size_of[spec]))
        slots = sorted({spec.slot for spec in specs})
        by_slot = {slot: [spec for spec in specs if spec.slot == slot] for slot in slots}
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
    def parent(self) -> Architecture | None:
        """What stands in every layer of the parent."""
        return parent_of(self.run) if self.run.parent.exists() else None

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots of the child's layers, in the order in which they run."""
        rows = self.summary["architecture"]
        return slots_of(rows)

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

    def file(self, name: str) -> Any:
        """The JSON of one file of the run, None where there is none."""
        return read_json(self.run / name) if (self.run / name).exists() else None


def slots_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The slots of `summary.architecture`, in the order in which they run."""
    return tuple(dict.fromkeys(slot for row in rows for slot in row["slots"]))


def percents_of_parent(rows: Sequence[Mapping[str, Any]], slot: str) -> list[float | None]:
    """By layer, runtime relative to the parent's own sub-block in percent; None where a layer has no such slot."""
    return [row["slots"][slot]["percent_of_parent"] if slot in row["slots"] else None for row in rows]
