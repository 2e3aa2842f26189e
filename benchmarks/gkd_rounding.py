"""Rounding in every step of GKD (straight-through) against rounding after it, at equal tokens.

Reads a run with formats, scores and costs (`puzzle run benchmarks/budgets.yaml --to score-blocks`). The child is the
best in sizes and formats together at SPEEDUP by the cost table, as in the benchmark `precision`, whose folder it
shares:

    during      refitted and rounded, then distilled with its weights rounded in every step, to scales that stay
    afterwards  the same sizes in the parent's precision, refitted, distilled, then refitted once more and rounded

results/gkd_rounding.json has kl_WAY_SPEEDx_TOKENS (of `afterwards` also before it is rounded) on validation text,
seconds_WAY of GKD, and kl_start.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RunArgument, linked, report
from benchmarks.precision import KEPT, Children
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.families import build, child_config, load_model
from puzzle_nas.formats.stored import FILE, Matrix, read_matrices
from puzzle_nas.library import assemble
from puzzle_nas.machine import describe, machine_of
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.refitting import refit


def main(
    run: RunArgument = Path("runs/budgets"),
    speedup: Annotated[float, typer.Argument(help="Of the child, predicted.")] = 2.0,
    tokens: Annotated[int, typer.Option(help="Of GKD.")] = 16384,
    rate: Annotated[float, typer.Option(help="Its learning rate.")] = 1e-4,
) -> None:
    """Distil both, round, compare, print and save."""
    children = Children(RunFolder(run))
    architecture = children.searched("joint", {"speedup": speedup})
    figures = {"kl_start": children.made(architecture)["kl"]}
    gkd = children.recipe.gkd.model_copy(update={"tokens": tokens, "learning_rate": rate})
    recipe = children.recipe.model_copy(update={"gkd": gkd})

    def distilled(way: str, start, matrices: dict[str, Matrix]):
        folder = linked(children.run, KEPT / f"gkd_rounding_{way}_{tokens}")
        began = time.perf_counter()
        training = Training(recipe, folder, LiveParent(children.parent), start, matrices)
        training.train()
        figures[f"seconds_{way}"] = time.perf_counter() - began
        return training.finish().eval()

    def note(name: str, model) -> None:
        figures[f"kl_{name}_{speedup:g}x_{tokens}"] = kl = children.validation.compare(model).kl_nats
        print(f"{name} {kl:.4f}", flush=True)

    start = children.folder(architecture) / "start"
    note("during", distilled("during", load_model(start, machine_of(recipe)), read_matrices(start / FILE)))

    wide = assemble(children.run, children.parent, architecture.plain)
    refit(children.parent, wide, children.calibration)
    wide = distilled("afterwards", wide, {})
    note("afterwards_not_rounded", wide)
    # Copies can be trained, which what was measured in inference mode cannot.
    weights = {name: weight.clone() for name, weight in wide.state_dict().items()}
    narrow = build(child_config(children.parent.config, architecture), weights)
    refit(children.parent, narrow, children.calibration)
    note("afterwards", narrow)
    report("gkd_rounding", figures, describe(machine_of(recipe)))
