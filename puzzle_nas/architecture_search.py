"""A run's tables as a search problem, and its answers as architectures. No torch.

A position is one slot of one layer; its options are the variants with their scores and costs. The summed scores
estimate the child's damage, the summed costs predict its costs (Puzzle, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puzzle_nas.architecture import SLOTS, Architecture, ParentShape, SearchSpace, Spec
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.costs import CostTable
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.search import (
    InfeasibleLimitsError,
    Problem,
    Solution,
    Table,
    greedy,
    homogeneous,
    max_params,
    no_op_only,
    solve,
)
from puzzle_nas.servable import servable_space


def position(layer: int, slot: str) -> str:
    """A position's label in tables."""
    return f"{layer:02d}.{slot}"


@dataclass(frozen=True)
class ArchitectureSearch:
    """One run's tables as a search problem."""

    space: SearchSpace
    shape: ParentShape
    costs: CostTable
    scores: dict[tuple[int, str], float]
    """Damage by layer and variant id; the parent's own is 0."""

    @classmethod
    def load(cls, recipe: Recipe, run: RunFolder, scored: bool = True) -> ArchitectureSearch:
        """From the run's cost table and scores; unscored, every variant counts as harmless."""
        shape = ParentShape(**read_json(run.parent, "prepare-parent")["shape"])
        space = servable_space(search_space_of(recipe, shape), shape, recipe.search.servable_by)
        scores: dict[tuple[int, str], float] = {}
        metric = recipe.scoring.metric
        field = "kl_nats" if metric == "kl" else "lm_loss_increase_nats"
        for layer, slot, spec in space:
            harmless = not scored or spec == shape.parent_spec(slot)
            path = run.score(layer, spec.id, metric=metric)
            scores[layer, spec.id] = 0.0 if harmless else read_json(path, "score-blocks")[field]["mean"]
        return cls(space, shape, CostTable.load(run, recipe), scores)

    @property
    def parent(self) -> Architecture:
        """Every layer as in the parent."""
        return Architecture.of_parent(self.shape)

    def problem(self, limits: dict[str, float]) -> Problem:
        """Minimise the summed score within the limits."""
        rows = [
            {
                "layer": position(layer, slot),
                "variant": spec.id,
                "score": self.scores[layer, spec.id],
                **self.costs.columns_of(spec),
            }
            for layer, slot, spec in self.space
        ]
        bounds = tuple(self.costs.limits(limits, self.parent))
        return Problem(Table.from_rows(rows), "score", limits=bounds, fixed=self.costs.fixed)

    def architecture(self, solution: Solution) -> Architecture:
        """The chosen variants as an architecture."""
        specs: dict[tuple[int, str], Spec] = {(layer, spec.id): spec for layer, _, spec in self.space}
        layers = range(self.shape.num_hidden_layers)
        return Architecture(
            tuple({slot: specs[i, solution.choices[position(i, slot)]] for slot in SLOTS} for i in layers)
        )

    def describe(self, solution: Solution) -> dict[str, Any]:
        """A solution as JSON."""
        architecture = self.architecture(solution)
        return {
            "architecture": architecture.to_list(),
            "score_sum": sum(self.scores[layer, spec.id] for layer, _, spec in architecture),
            "speedup_predicted": self.costs.mix_ms(self.parent) / self.costs.mix_ms(architecture),
            "runtime_ms_predicted": self.costs.mix_ms(architecture),
            "memory_bytes": self.costs.memory_bytes(architecture),
            "parameters": self.costs.parameters(architecture),
        }

    def solve(self, limits: dict[str, float], gap: float, time_limit_seconds: float) -> Solution:
        """The best choice within the limits.

        Raises:
            InfeasibleError: names each limit, in the user's terms, and the tightest value that can be reached.
        """
        try:
            return solve(self.problem(limits), gap, time_limit_seconds)[0]
        except InfeasibleLimitsError as error:
            raise InfeasibleError(_explain(self, limits, error)) from error

    def baselines(
        self, problem: Problem, child: Solution, gap: float, time_limit_seconds: float
    ) -> dict[str, Callable[[], Solution]]:
        """What a child is compared with under the same limits, each found when called (Puzzle, tables 10-12)."""
        groups = {position(layer, slot): layer for layer, slot, _ in self.space}
        slots = {position(layer, slot): slot for layer, slot, _ in self.space}
        plain = {
            (position(layer, slot), spec.id)
            for layer, slot, spec in self.space
            if spec.kind == "no_op" or spec == self.shape.parent_spec(slot)
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
            return f"{found.costs.reachable(name, value, found.parent, column):.4g}"

        text = f"{name}={limits[name]:g} can reach {in_users_terms(report.reachable_alone)}"
        if len(error.reports) > 1:
            text += " alone"
            if report.reachable_with_others is not None:
                text += f" and {in_users_terms(report.reachable_with_others)} while the others hold"
        parts.append(text)
    way_out = "Loosen a limit or offer cheaper variants."
    return f"No child of this search space meets the limits: {'; '.join(parts)}. {way_out}"
