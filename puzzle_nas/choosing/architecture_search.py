"""A run's tables as a search problem, and its answers as architectures. No torch.

A position is one slot of one layer, or a whole layer where blocks are scored, or embeddings with LM head; its options
are the variants with their scores and costs. The summed scores estimate the child's damage, the summed costs predict
its costs (Puzzle, section 3). A variant in a format has the variant's score and, on top, that of the parent's own
sub-block in that format: how well that adds up, docs/results.md shows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puzzle_nas.architecture import Architecture, Choice, choice_id
from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.effort import GAP, TIME_LIMIT_SECONDS
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.search import (
    FewerSolutionsError,
    InfeasibleLimitsError,
    Limit,
    Problem,
    Solution,
    Table,
    greedy,
    homogeneous,
    max_params,
    no_op_only,
    solve,
)
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.servable import servable_space
from puzzle_nas.specs import Spec


def position(layer: int, specs: Sequence[Spec]) -> str:
    """A position's label in tables: the layer, and the slot where the choice is of one slot only."""
    return f"{layer:02d}.{specs[0].slot}" if len(specs) == 1 else f"{layer:02d}"


def parent_of(run: RunFolder) -> Architecture:
    """What stands in every layer of the run's parent."""
    facts = read_json(run.parent, "prepare-parent")
    with written_by_this_version(run.parent, "prepare-parent"):
        return Architecture.from_list(facts["architecture"])


@dataclass(frozen=True)
class ArchitectureSearch:
    """One run's tables as a search problem."""

    space: SearchSpace
    costs: CostTable
    scores: dict[Choice, float]
    """Damage of every choice, sub-blocks or whole blocks; the parent's own is 0. What must not be chosen is absent."""
    library: str = "main"
    """What the scores are of."""

    @classmethod
    def load(cls, recipe: Recipe, run: RunFolder) -> ArchitectureSearch:
        """From the run's scores and its cost table as `CostTable.load` gives it."""
        return cls.load_with(CostTable.load(run, recipe), recipe, run)

    @classmethod
    def load_with(
        cls,
        costs: CostTable,
        recipe: Recipe,
        run: RunFolder,
        scored: bool = True,
        library: str | None = None,
        by: str | None = None,
    ) -> ArchitectureSearch:
        """From the run's scores; unscored, every variant counts as harmless.

        Args:
            library: None means the recipe's final one. The coupled library's pairs have scores of their own; any other
                block has those of the main library.
            by: `kl` or `lm_loss` instead of the recipe's metric; scores by either hold both.
        """
        family = read_json(run.parent, "prepare-parent")["family"]
        space = servable_space(search_space_of(recipe, parent_of(run)), recipe.search.servable_by, family)
        metric, library = recipe.scoring.metric, library or recipe.final_library
        field = {"kl": "kl_nats", "lm_loss": "lm_loss_increase_nats"}.get(by or metric, "task_loss")
        by_block = recipe.scoring.unit == "block"

        @functools.cache
        def measured(layer: int, specs: tuple[Spec, ...], library: str = "main") -> float | None:
            if not scored or space.is_parents((layer, specs)):
                return 0.0
            made_by = "couple-blocks" if library == "coupled" else "score-blocks"
            found = read_json(run.score(layer, choice_id(specs), library, metric), made_by)
            return None if "problem" in found else found[field]["mean"]

        def score(layer: int, specs: tuple[Spec, ...], library: str = "main") -> float | None:
            own = [space.own(layer, spec.slot).stored(spec.format) for spec in specs if spec.format]
            parts = [measured(layer, tuple(spec.plain for spec in specs), library)]
            parts += [measured(layer, (spec,)) for spec in own]
            return None if None in parts else sum(parts)  # type: ignore[arg-type]

        scores = {choice: score(*choice) for choice in space.choices(by_block)}
        if scored and library == "coupled":
            pairs = read_json(run.coupled_pairs, "couple-blocks")["layers"]
            alone, scores = scores, {}
            for layer, specs in space.choices(by_block=True):
                if layer == len(pairs):
                    scores[layer, specs] = alone[layer, specs]
                elif choice_id([spec.plain for spec in specs]) in pairs[layer]:
                    scores[layer, specs] = score(layer, specs, library)
                else:
                    parts = [alone[layer, p] for p in ([specs] if by_block else [(spec,) for spec in specs])]
                    known = [part for part in parts if part is not None]
                    scores[layer, specs] = sum(known) if len(known) == len(parts) else None
        return cls(space, costs, {c: value for c, value in scores.items() if value is not None}, library)

    @classmethod
    def at_best_batch_sizes(
        cls,
        recipe: Recipe,
        run: RunFolder,
        limits: dict[str, float],
        scored: bool = True,
        library: str | None = None,
    ) -> ArchitectureSearch:
        """With those of the recipe's batch sizes that allow the lowest summed score within the limits.

        Raises:
            InfeasibleError: there is no such child at any batch size.
        """
        every = [cls.load_with(costs, recipe, run, scored, library) for costs in CostTable.load_mixes(run, recipe)]
        if len(every) == 1:
            return every[0]
        best, lowest, failure = None, math.inf, None
        for found in every:
            try:
                (solution,) = found.solve(limits)
            except InfeasibleError as error:
                failure = error
                continue
            if solution.score < lowest:
                best, lowest = found, solution.score
        if best is None:
            largest = ", ".join(f"{s.name} at {s.batch_size}" for s in every[-1].costs.scenarios)
            raise InfeasibleError(f"At no batch size of scenarios; at the largest ({largest}): {failure}")
        return best

    def by_either_loss(self, recipe: Recipe, run: RunFolder) -> tuple[ArchitectureSearch, ...]:
        """This search, the one by the other of KL and LM loss, and by their mean; itself alone if a task scores."""
        if recipe.scoring.by_task:
            return (self,)
        other = self.load_with(
            self.costs, recipe, run, library=self.library, by="kl" if recipe.scoring.metric == "lm_loss" else "lm_loss"
        ).scores
        mean = {choice: (score + other[choice]) / 2 for choice, score in self.scores.items()}
        return self, replace(self, scores=other), replace(self, scores=mean)

    @property
    def parent(self) -> Architecture:
        """Every layer as in the parent."""
        return self.space.parent

    def problem(self, limits: dict[str, float], near: Architecture | None = None, max_changes: int = 0) -> Problem:
        """Minimise the summed score within the limits; at most `max_changes` choices away from `near`."""
        bounds = self.costs.limits(limits, self.parent)
        rows = []
        for (layer, specs), score in self.scores.items():
            costs = [self.costs.columns_of(layer, spec) for spec in specs]
            row = {"layer": position(layer, specs), "variant": choice_id(specs), "score": score}
            row |= {column: sum(cost[column] for cost in costs) for column in costs[0]}
            if near is not None:
                row["changes"] = float(not self.holds(near, layer, specs))
            rows.append(row)
        if near is not None:
            bounds.append(Limit("changes", maximum=float(max_changes)))
        fixed = self.costs.fixed
        if len(self.space.heads) == 1:
            head = self.costs.columns_of(len(self.parent.layers), self.parent.head)
            fixed = {column: value + head[column] for column, value in fixed.items()}
        return Problem(Table.from_rows(rows), "score", limits=tuple(bounds), fixed=fixed)

    @staticmethod
    def holds(architecture: Architecture, layer: int, specs: Sequence[Spec]) -> bool:
        """Whether the architecture has all of these in that layer."""
        return all(architecture.at(layer, spec.slot) == spec for spec in specs)

    @property
    def removable_layers(self) -> set[int]:
        """Those that may be left out whole."""
        removed = self.parent.without(range(len(self.parent.layers)))
        of_layers = [choice for choice in self.scores if choice[0] < len(self.parent.layers)]
        places = {position(layer, specs): layer for layer, specs in of_layers}
        empty = {position(layer, specs) for layer, specs in of_layers if self.holds(removed, layer, specs)}
        return set(places.values()) - {layer for place, layer in places.items() if place not in empty}

    def without(self, layers: Container[int]) -> ArchitectureSearch:
        """The search where these, removable, layers are left out."""
        removed = self.parent.without(layers)
        kept = {c: score for c, score in self.scores.items() if c[0] not in layers or self.holds(removed, *c)}
        return replace(self, scores=kept)

    def meets(self, limits: dict[str, float], architecture: Architecture) -> bool:
        """Whether the predicted costs are within the limits."""
        bounds = self.costs.limits(limits, self.parent)
        return all(self.costs.total(b.column, architecture) <= b.maximum for b in bounds if b.maximum is not None)

    def score_of(self, architecture: Architecture) -> float:
        """The summed score."""
        return sum(score for (layer, specs), score in self.scores.items() if self.holds(architecture, layer, specs))

    def architecture(self, solution: Solution) -> Architecture:
        """The chosen variants as an architecture."""
        found = self.parent
        for layer, specs in self.scores:
            if solution.choices[position(layer, specs)] == choice_id(specs):
                for spec in specs:
                    found = found.replaced(layer, spec)
        return found

    def describe(self, architecture: Architecture) -> dict[str, Any]:
        """An architecture and what is predicted of it, as JSON."""
        return {
            "architecture": architecture.to_list(),
            "score_sum": self.score_of(architecture),
            "speedup_predicted": self.costs.mix_ms(self.parent) / self.costs.mix_ms(architecture),
            "runtime_ms_predicted": self.costs.mix_ms(architecture),
            "memory_bytes": self.costs.memory_bytes(architecture),
            "parameters": self.costs.parameters(architecture),
        }

    def solve(
        self,
        limits: dict[str, float],
        gap: float = GAP,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
        num_solutions: int = 1,
        min_different: int = 1,
    ) -> list[Solution]:
        """The best choices within the limits, as `search.solve`; fewer of them where fewer differ that much.

        Raises:
            InfeasibleError: names each limit, in the user's terms, and the tightest value that can be reached.
        """
        try:
            return solve(self.problem(limits), gap, time_limit_seconds, num_solutions, min_different)
        except FewerSolutionsError as error:
            return error.solutions
        except InfeasibleLimitsError as error:
            raise InfeasibleError(_explain(self, limits, error)) from error

    def baselines(
        self,
        problem: Problem,
        child: Solution,
        gap: float = GAP,
        time_limit_seconds: float = TIME_LIMIT_SECONDS,
    ) -> dict[str, Callable[[], Solution]]:
        """What a child is compared with under the same limits, each found when called (Puzzle, tables 10-12)."""
        groups = {position(layer, specs): layer for layer, specs in self.scores}
        slots = {position(layer, specs): tuple(spec.slot for spec in specs) for layer, specs in self.scores}
        plain = {
            (position(layer, specs), choice_id(specs))
            for layer, specs in self.scores
            if all(spec.empty or self.space.is_parents((layer, (spec,))) for spec in specs)
        }
        restricted = no_op_only(problem, lambda place, variant: (place, variant) in plain)
        return {
            "greedy": lambda: greedy(problem, groups),
            "homogeneous": lambda: homogeneous(problem, "runtime_ms", child.costs["runtime_ms"], groups, slots),
            "max_params": lambda: max_params(problem, "parameters", gap, time_limit_seconds),
            "no_op_only": lambda: solve(restricted, gap, time_limit_seconds)[0],
        }


def _explain(found: ArchitectureSearch, limits: dict[str, float], error: InfeasibleLimitsError) -> str:
    owners: dict[tuple[str, float | None], str] = {}
    for name, value in limits.items():
        for bound in found.costs.limits({name: value}, found.parent):
            owners[bound.column, bound.maximum] = name
    parts = []
    for report in error.reports:
        name = owners[report.column, report.asked]

        def in_users_terms(value: float, name: str = name, column: str = report.column) -> str:
            return f"{found.costs.converted(name, value, found.parent, column):.4g}"

        text = f"{name}={limits[name]:g} can reach {in_users_terms(report.reachable_alone)}"
        if len(error.reports) > 1:
            text += " alone"
            if report.reachable_with_others is not None:
                text += f" and {in_users_terms(report.reachable_with_others)} while the others hold"
        parts.append(text)
    way_out = "Loosen a limit or offer cheaper variants."
    return f"No child of this search space meets the limits: {'; '.join(parts)}. {way_out}"
