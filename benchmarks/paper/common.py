"""What the paper's tables share: budgets, children measured once, and the verdict on an ordering.

Every script prints its table in the paper's row order with our figures beside the paper's, says whether the ordering
came out, and keeps benchmarks/results/paper/NAME.json. Ours are KL(parent || child) in nats on validation text, where
nothing else is said: a parent of 135 M parameters is too near chance on the paper's tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.results import RESULTS, save
from puzzle_nas import pipeline
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.recipe import Recipe, parse_recipe
from puzzle_nas.scoring.comparison import ParentReference


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
            "data.sample_tokens=131072",
            "bld.tokens=1000000",
            "bld.batch_tokens=4096",
            "gkd.batch_tokens=4096",
        ),
        2_000_000,
    ),
}
SPEEDUPS = (1.25, 1.5, 2.0)


class Children:
    """Children of one run, assembled and measured; figures are kept in runs/benchmark-paper."""

    def __init__(self, budget: Budget):
        self.budget, self.run = budget, budget.run
        self.kept = Path(f"runs/benchmark-paper/{budget.name}-kl.json")

    @cached_property
    def recipe(self) -> Recipe:
        """The run's; a run that is not there is made, up to its scores."""
        if not self.run.recipe.is_file():
            recipe = parse_recipe(Path("recipes/torch.yaml").read_text(), self.budget.overrides)
            pipeline.run_stages(recipe, self.run, last="score-blocks")
        return pipeline.open_run(self.run)

    @cached_property
    def found(self) -> ArchitectureSearch:
        """Its search, by KL scores."""
        return ArchitectureSearch.load(self.recipe, self.run)

    @cached_property
    def by_lm_loss(self) -> ArchitectureSearch:
        """The same by the increase in LM loss."""
        scores = {
            (layer, (spec,)): read_json(self.run.score(layer, spec.id))["lm_loss_increase_nats"]["mean"]
            if score
            else 0.0
            for (layer, (spec,)), score in self.found.scores.items()
        }
        return replace(self.found, scores=scores)

    @cached_property
    def parent(self) -> PreTrainedModel:
        """The run's parent, on no more threads than there are cores to use."""
        parent = load_parent(self.recipe, self.run)
        torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
        return parent

    @cached_property
    def validation(self) -> ParentReference:
        """The run's validation text."""
        return ParentReference(self.parent, load_tokens(self.run, "validation"))

    def chosen(self, speedup: float, by: ArchitectureSearch | None = None) -> Architecture:
        """What the mixed-integer search takes at a speed-up."""
        found, settings = by or self.found, self.recipe.search
        (best,) = found.solve({"speedup": speedup}, settings.gap, settings.time_limit_seconds)
        return found.architecture(best)

    def baseline(self, name: str, speedup: float) -> Architecture:
        """A baseline under the same limit.

        Raises:
            InfeasibleError: it cannot meet the limit.
        """
        limits, settings = {"speedup": speedup}, self.recipe.search
        (best,) = self.found.solve(limits, settings.gap, settings.time_limit_seconds)
        problem = self.found.problem(limits)
        return self.found.architecture(
            self.found.baselines(problem, best, settings.gap, settings.time_limit_seconds)[name]()
        )

    def kl_nats(self, architecture: Architecture) -> float:
        """KL on validation of the assembled child, nothing distilled beyond BLD."""
        kept = read_json(self.kept) if self.kept.exists() else {}
        key = fingerprint(architecture.to_list())
        if key not in kept:
            kept[key] = self.validation.compare(assemble(self.run, self.parent, architecture)).kl_nats
            write_json(self.kept, kept)
        return kept[key]


@dataclass(frozen=True)
class Measured:
    """Ours: column -> row -> figure, what the paper found and whether we find it, and what explains a difference."""

    columns: Mapping[str, Mapping[str, float]]
    claims: Mapping[str, bool]
    remark: str = ""


def ordering(
    paper: Mapping[str, float], columns: Mapping[str, Mapping[str, float]], paper_lower_is_better: bool = False
) -> dict[str, bool]:
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


def figures_of(name: str) -> dict:
    """What another benchmark kept.

    Raises:
        SystemExit: nothing; names the way out.
    """
    path, script = RESULTS / f"{name}.json", RESULTS.with_name(f"{name}.py")
    if not path.exists():
        way_out = f"Make it with: python benchmarks/{name}.py" if script.exists() else f"git checkout -- {path}"
        raise SystemExit(f"{path} is missing. {way_out}")
    return json.loads(path.read_text())["figures"]


@dataclass(frozen=True)
class Table:
    """One of the paper's tables or figures."""

    name: str
    """`table_10`, which is also its script."""
    title: str
    paper_unit: str
    paper: Mapping[str, float | str]
    """Rows in the paper's order."""
    ours: str
    """What our figures are."""
    measure: Callable[..., Measured] = field(repr=False)
    """Of a budget, and of the options as keywords, None where they are not given."""
    options: tuple[str, ...] = ()
    """Further ones of the command, without their dashes."""

    def main(self) -> None:
        """Measure, print, keep."""
        parser = argparse.ArgumentParser(description=f"{self.title} ({self.name})")
        parser.add_argument("--budget", choices=BUDGETS, default="cpu")
        for option in self.options:
            parser.add_argument(f"--{option}")
        given = vars(parser.parse_args())
        budget = BUDGETS[given.pop("budget")]
        measured = self.measure(budget, **given)
        figures: dict = {
            f"{row}@{column}": value for column, rows in measured.columns.items() for row, value in rows.items()
        }
        figures |= {f"claim.{claim}": held for claim, held in measured.claims.items()}
        came_out = all(measured.claims.values()) if measured.claims else None
        figures |= {"came_out": came_out, "remark": measured.remark}
        command = f"python -m benchmarks.paper.{self.name} --budget {budget.name}"
        command += "".join(f" --{option} {value}" for option, value in given.items() if value is not None)
        print(f"{self.title}\n")
        print(self.markdown(figures))
        print("Written to", save(f"paper/{self.name}", figures, command=command))

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
        rows = dict.fromkeys([*self.paper, *(row for row, _ in cells)])
        lines = [
            "| | " + " | ".join([f"paper, {self.paper_unit}", *columns]) + " |",
            "|---|" + "---|" * (1 + len(columns)),
        ]
        for row in rows:
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
