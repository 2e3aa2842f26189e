"""What the paper's tables share: budgets, children of one run measured once, and the verdict on an ordering."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from benchmarks.common import RESULTS, opened
from puzzle_nas import pipeline
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.library import assemble
from puzzle_nas.recipe_text import load_recipe
from puzzle_nas.scoring.comparison import ParentReference

SPEEDUPS = (1.25, 1.5, 2.0)
KEPT = Path("runs/benchmark-paper")


@dataclass(frozen=True)
class Budget:
    """How much is spent, and on which run."""

    name: str
    run: RunFolder
    overrides: tuple[str, ...]
    """Of recipes/torch.yaml, for a run that is not there yet."""
    gkd_tokens: int
    """For each child that a table distils."""


BUDGETS = {
    "cpu": Budget("cpu", RunFolder("runs/torch"), (), 8_192),
    "gpu": Budget(
        "gpu",
        RunFolder("runs/paper-gpu"),
        (
            "data.train_tokens=4000000",
            "data.calibration_tokens=131072",
            "data.scoring_tokens=65536",
            "data.selection_tokens=32768",
            "data.validation_tokens=131072",
            "bld.tokens=1000000",
            "bld.batch_tokens=4096",
            "gkd.batch_tokens=4096",
        ),
        2_000_000,
    ),
}


class Children:
    """Children of one run, assembled and measured; figures are kept."""

    def __init__(self, budget: Budget):
        self.budget, self.run = budget, budget.run
        self.kept = KEPT / f"{budget.name}-kl.json"
        if not self.run.recipe.is_file():
            recipe = load_recipe(Path("recipes/torch.yaml"), list(budget.overrides))
            pipeline.run_stages(recipe, self.run, last="score-blocks")
        self.recipe, self.parent = opened(self.run)

    @cached_property
    def found(self) -> ArchitectureSearch:
        """Its search, by KL scores."""
        return ArchitectureSearch.load(self.recipe, self.run)

    @cached_property
    def by_lm_loss(self) -> ArchitectureSearch:
        """The same by the increase in LM loss."""
        scores = self.found.scores.copy()
        for layer, (spec,) in (choice for choice, score in scores.items() if score):
            scores[layer, (spec,)] = read_json(self.run.score(layer, spec.id))["lm_loss_increase_nats"]["mean"]
        return replace(self.found, scores=scores)

    @cached_property
    def validation(self) -> ParentReference:
        """The run's validation text."""
        return ParentReference(self.parent, load_tokens(self.run, "validation"))

    def chosen(self, speedup: float, by: ArchitectureSearch | None = None, baseline: str | None = None) -> Architecture:
        """What the mixed-integer search takes at a speed-up, or a baseline under the same limit.

        Raises:
            InfeasibleError: the baseline cannot meet the limit.
        """
        found, limits = by or self.found, {"speedup": speedup}
        (best,) = found.solve(limits)
        if baseline:
            best = found.baselines(found.problem(limits), best)[baseline]()
        return found.architecture(best)

    def kl_nats(self, architecture: Architecture) -> float:
        """KL on validation of the assembled child, nothing distilled beyond BLD."""
        kept = read_json(self.kept) if self.kept.exists() else {}
        key = fingerprint(architecture.to_list())
        if key not in kept:
            kept[key] = self.validation.compare(assemble(self.run, self.parent, architecture)).kl_nats
            write_json(self.kept, kept)
        return kept[key]


Columns = Mapping[str, Mapping[str, float]]
"""Column -> row -> figure."""


@dataclass(frozen=True)
class Measured:
    """Ours, what the paper found and whether we find it, and what explains a difference."""

    columns: Columns
    claims: Mapping[str, bool]
    remark: str = ""

    @property
    def figures(self) -> dict:
        """Flat."""
        figures: dict = {
            f"{row}@{column}": value for column, rows in self.columns.items() for row, value in rows.items()
        }
        figures |= {f"claim.{claim}": held for claim, held in self.claims.items()}
        return figures | {"came_out": all(self.claims.values()) if self.claims else None, "remark": self.remark}


def ordering(paper: Mapping[str, float], columns: Columns, paper_lower_is_better: bool = False) -> dict[str, bool]:
    """For every two rows that differ in the paper: whether the better one has the lower KL here, column by column."""
    claims = {}
    for one, other in itertools.combinations(paper, 2):
        if paper[one] == paper[other]:
            continue
        better, worse = (one, other) if (paper[one] < paper[other]) == paper_lower_is_better else (other, one)
        for column, figures in columns.items():
            if better in figures and worse in figures:
                claims[f"{column}: {better} better than {worse}"] = figures[better] < figures[worse]
    return claims


@dataclass(frozen=True)
class Table:
    """One of the paper's tables or figures."""

    name: str
    title: str
    paper_unit: str
    paper: Mapping
    """Rows in the paper's order."""
    ours: str
    """What our figures are."""
    measure: Callable[[Budget], Measured] | None = field(default=None, repr=False)
    """None where the experiment is settled and its script gone: what it gave is kept."""

    @property
    def kept(self) -> dict | None:
        """What the last call kept."""
        path = RESULTS / f"paper/{self.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def markdown(self, figures: Mapping) -> str:
        """Side by side, and the verdict."""
        claims = {k.removeprefix("claim."): held for k, held in figures.items() if k.startswith("claim.")}
        cells = {tuple(k.split("@")): v for k, v in figures.items() if "@" in k}
        columns = list(dict.fromkeys(column for _, column in cells))
        lines = [
            "| | " + " | ".join([f"paper, {self.paper_unit}", *columns]) + " |",
            "|---|" + "---|" * (1 + len(columns)),
        ]
        for row in dict.fromkeys([*self.paper, *(row for row, _ in cells)]):
            values = [cells.get((row, column)) for column in columns]
            shown = ["" if v is None else f"{v:.4g}" for v in values]
            lines.append("| " + " | ".join([row, str(self.paper.get(row, "")), *shown]) + " |")
        failed = [claim for claim, held in claims.items() if not held]
        verdict = "The ordering came out" if not failed else "The ordering did not come out"
        held = f"{verdict} ({len(claims) - len(failed)} of {len(claims)} comparisons)."
        lines += ["", held if claims else "Nothing here can be compared."]
        if failed:
            lines[-1] += " Otherwise here: " + "; ".join(failed) + "."
        return "\n".join([*lines, *([figures["remark"]] if figures["remark"] else [])]) + "\n"


TABLES: dict[str, Table] = {}


def table(name: str, title: str, paper_unit: str, paper: Mapping, ours: str):
    """Make what measures a table that table."""

    def made(measure: Callable[[Budget], Measured] | None) -> None:
        TABLES[name] = Table(name, title, paper_unit, paper, ours, measure)

    return made
