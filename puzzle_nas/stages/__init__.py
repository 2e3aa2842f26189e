"""The stages in order, as data: what each reads and writes. What it does is `run` in the file of its name. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.recipe import Recipe

EVERYTHING = ("*",)
ARITHMETIC = ("precision", "device")
"""What a stage reads that computes with a model."""
BLD = ("bld.learning_rate", "bld.batch_tokens", "bld.shard_tokens")
"""What decoupled and coupled BLD have in common."""
WITHOUT_EFFECT = ("memory", "threads")
"""Settings that say how a stage works and never what it makes, so that any may read them undeclared. A stage whose
measured times depend on the threads declares them."""


@dataclass(frozen=True)
class Stage:
    """One step from the run folder to the run folder."""

    name: str
    """Of its file, its record and, with dashes, its command."""
    help: str
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""
    reads: tuple[str, ...]
    """Settings that its outputs depend on, by dotted name; a part of the recipe stands for all that is in it."""
    writes: tuple[str, ...]
    """Its outputs, as glob patterns."""
    checks: tuple[str, ...] = ()
    """Settings that it only tests: they decide whether it refuses the recipe, and nothing that it writes."""
    shared: bool = False
    """Where there are several processes, whether each does its share; else the first runs it alone."""
    why_left_out: Callable[[Recipe], str | None] = lambda _: None
    """A sentence, where a recipe does without this stage, which then counts for nothing."""

    @property
    def command(self) -> str:
        """As people type it."""
        return self.name.replace("_", "-")

    def run(self, recipe: Recipe, run: RunFolder) -> None:
        """Read the run folder, write `writes`."""
        importlib.import_module(f"{__name__}.{self.name}").run(recipe, run)


def _without_coupled_bld(recipe: Recipe) -> str | None:
    if recipe.bld.coupled_tokens:
        return None
    return "The recipe leaves coupled BLD out; ask for it with bld.coupled_tokens, such as bld.coupled_tokens=65536."


STAGES = (
    Stage(
        "prepare_parent",
        "Find the parent; convert it to a transformers checkpoint if it is not one.",
        needs=(),
        reads=("parent", *ARITHMETIC),
        writes=("parent.json", "parent/*"),
        checks=("engine", "kv_format", "scenarios", "search_space"),
    ),
    Stage(
        "prepare_data",
        "Pack text into token blocks, in five splits.",
        needs=("prepare_parent",),
        reads=("data", "seed", *ARITHMETIC),
        writes=("data/*.safetensors", "data/data.json", "data/sources/*"),
    ),
    Stage(
        "measure_costs",
        "Memory and runtime of every variant on this machine.",
        needs=("prepare_parent",),
        reads=("seed", *ARITHMETIC, "threads", "engine", "kv_format", "search_space", "scenarios", "costs"),
        writes=("costs/*.json",),
        checks=(
            *("search.limits", "search.servable_by"),
            *("scoring.metric", "scoring.unit", "bld.coupled_tokens"),
        ),
    ),
    Stage(
        "build_library",
        "Every variant of every layer, initialised from the parent.",
        needs=("prepare_parent", "prepare_data"),
        reads=("seed", *ARITHMETIC, "search_space", "library"),
        writes=("library/initial/*/*",),
    ),
    Stage(
        "distill_blocks",
        "Train every variant to imitate its parent block (BLD).",
        needs=("build_library",),
        reads=("seed", *ARITHMETIC, "search_space", *BLD, "bld.tokens"),
        writes=("library/main/*/*",),
        shared=True,
    ),
    Stage(
        "score_blocks",
        "Score every variant: what is lost if it alone replaces the parent's.",
        needs=("distill_blocks",),
        reads=(*ARITHMETIC, "search_space", "scoring"),
        writes=("scores/main/*/*.json",),
        shared=True,
    ),
    Stage(
        "couple_blocks",
        "Train and score pairs of attention and FFN that a first search uses (coupled BLD).",
        needs=("score_blocks", "measure_costs"),
        reads=(
            *("seed", *ARITHMETIC, "engine", "search_space", "scenarios", "scoring"),
            *(*BLD, "bld.coupled_tokens", "bld.coupled_solutions"),
            *("search.limits", "search.servable_by"),
        ),
        writes=("library/coupled/*", "library/coupled/*/*", "scores/coupled/*/*"),
        shared=True,
        why_left_out=_without_coupled_bld,
    ),
    Stage(
        "search_architecture",
        "The best architecture within the recipe's limits.",
        needs=("score_blocks", "measure_costs", "couple_blocks"),
        reads=(
            *(*ARITHMETIC, "threads", "engine", "kv_format", "search_space", "scenarios", "search", "refit"),
            *("costs.file", "bld.coupled_tokens", "scoring.metric", "scoring.unit"),
        ),
        writes=("search/main/architecture.json", "search/main/candidates/*.json"),
    ),
    Stage(
        "assemble_child",
        "The chosen variants as one checkpoint.",
        needs=("search_architecture",),
        reads=("parent", *ARITHMETIC),
        writes=("child/*", "baselines/*/*"),
    ),
    Stage(
        "refit_child",
        "Correct the assembled child in closed form.",
        needs=("assemble_child",),
        reads=("parent", *ARITHMETIC, "refit"),
        writes=("refit.json", "child-refit/*"),
    ),
    Stage(
        "distill_child",
        "Train the whole child against the parent (GKD).",
        needs=("refit_child",),
        reads=("parent", "seed", *ARITHMETIC, "gkd"),
        writes=("gkd.json", "child-gkd/*"),
        shared=True,
    ),
    Stage(
        "evaluate_child",
        "Child against parent: quality and measured speed.",
        needs=("distill_child",),
        reads=(*ARITHMETIC, "threads", "engine", "kv_format", "scenarios"),
        writes=("evaluation.json", "measured.json"),
    ),
    Stage(
        "write_report",
        "Write summary.json and report.html.",
        needs=("evaluate_child",),
        reads=EVERYTHING,
        writes=("summary.json", "report.html"),
    ),
)
