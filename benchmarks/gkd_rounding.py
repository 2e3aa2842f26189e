"""Rounding in every step of GKD (straight-through) against rounding after it, at equal tokens.

Reads a run with formats, scores and costs (`puzzle run benchmarks/budgets.yaml --to score-blocks`). The child is the
best in sizes and formats together at SPEEDUP by the cost table, as in the benchmark `precision`, whose folder it
shares:

    during      refitted and rounded, then distilled with its weights rounded in every step, to scales that stay
    afterwards  the same sizes in the parent's precision, refitted, distilled, then refitted once more and rounded

results/gkd_rounding.json has kl_start and kl_WAY_SPEEDx_TOKENS_RATE, of `afterwards` also before it is rounded, on
validation text.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from benchmarks.common import RunArgument, linked, report
from benchmarks.precision import KEPT, Children
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.families import build, child_config, load_model
from puzzle_nas.formats.stored import FILE, Matrix, read_matrices
from puzzle_nas.library import assemble
from puzzle_nas.machine import describe, machine_of
from puzzle_nas.recipe import Recipe
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.refitting import refit


def distilled(
    children: Children, recipe: Recipe, model: PreTrainedModel, matrices: dict[str, Matrix], name: str
) -> PreTrainedModel:
    """After GKD; goes on where an earlier call of this name stopped."""
    folder = linked(children.run, KEPT / f"gkd_rounding_{name}")
    training = Training(recipe, folder, LiveParent(children.parent), model, matrices)
    training.train()
    return training.finish().eval()


def main(
    run: RunArgument = Path("runs/budgets"),
    speedup: Annotated[float, typer.Argument(help="Of the child, predicted.")] = 2.0,
    tokens: Annotated[int, typer.Option(help="Of GKD.")] = 16384,
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates; 1e-4 and 3e-5 by default.")] = None,
) -> None:
    """Distil both, round, compare, print and save."""
    children = Children(RunFolder(run))
    parent, calibration = children.parent, children.calibration
    architecture = children.searched("joint", {"speedup": speedup})
    figures = {"kl_start": children.made(architecture)["kl"]}
    start = children.folder(architecture) / "start"
    wide = assemble(children.run, parent, architecture.plain)
    refit(parent, wide, calibration)

    def note(name: str, model: PreTrainedModel) -> None:
        figures[f"kl_{name}"] = kl = children.validation.compare(model).kl_nats
        print(f"{name} {kl:.4f}", flush=True)

    note("start_not_rounded", wide)
    for learning_rate in rate or (1e-4, 3e-5):
        gkd = children.recipe.gkd.model_copy(update={"tokens": tokens, "learning_rate": learning_rate})
        recipe, name = children.recipe.model_copy(update={"gkd": gkd}), f"{speedup:g}x_{tokens}_{learning_rate:g}"
        narrow = load_model(start, machine_of(recipe))
        note(f"during_{name}", distilled(children, recipe, narrow, read_matrices(start / FILE), f"during_{name}"))
        taught = distilled(children, recipe, copy.deepcopy(wide), {}, f"afterwards_{name}")
        note(f"afterwards_not_rounded_{name}", taught)
        # Copies can be trained, which what was measured in inference mode cannot.
        weights = {weight: value.clone() for weight, value in taught.state_dict().items()}
        narrow = build(child_config(parent.config, architecture), weights)
        refit(parent, narrow, calibration)
        note(f"afterwards_{name}", narrow)
    report("gkd_rounding", figures, describe(machine_of(children.recipe)))
