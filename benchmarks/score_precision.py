"""Replace-1 scores in bfloat16 against those in float32, of the same weights: as measured, and less rounding alone.

Reads a run with formats, scores aside (`puzzle run recipes/quickstart.yaml --to distill-blocks`), where bfloat16 has
products of its own. Figures are, of the parent's own sub-blocks in each format and of all other variants, the mean and
the largest absolute error in nats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import RunArgument, report
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import architecture_of, load_model, parent_checkpoint
from puzzle_nas.library import block_subblocks
from puzzle_nas.machine import Machine, machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of
from puzzle_nas.scoring.replacement import ReplacementWalk, batch_tokens_of

LAYERS = (0, 5, 14, 24, 29)


def scores(run: RunFolder, dtype: torch.dtype, layers: Sequence[int]) -> dict[tuple[int, str, str], float]:
    """KL by layer, variant and format; of the variant "rounding", what rounding alone does."""
    recipe = open_run(run)
    parent = load_model(parent_checkpoint(run), Machine(machine_of(recipe).device, dtype))
    space = search_space_of(recipe, architecture_of(parent.config))
    walk = ReplacementWalk(parent, load_tokens(run, "scoring"), batch_tokens_of(parent))
    found = {}
    for layer in layers:
        walk.climb_to(layer)
        specs = space.variants(layer)
        tried = [*block_subblocks(run, parent, layer, [(spec,) for spec in specs]), *walk.rounded_otherwise()]
        names = [*((spec.id, spec.format or "no_format") for spec in specs), ("rounding", "")]
        for name, result in zip(names, walk.try_variants(tried), strict=False):
            found[layer, *name] = float(result.kl_nats.double().mean())
    return found


def main(
    run: RunArgument = Path("runs/quickstart"),
    layers: Annotated[list[int] | None, typer.Argument(metavar="[LAYER]...")] = None,
) -> None:
    """Print and keep them."""
    exact, rounded = (scores(RunFolder(run), dtype, layers or LAYERS) for dtype in (torch.float32, torch.bfloat16))
    errors: dict[str, list[float]] = defaultdict(list)
    for (layer, name, form), true in exact.items():
        measured, of_rounding = rounded[layer, name, form], rounded[layer, "rounding", ""]
        print(f"layer {layer:2d}  {name:24s} float32 {true:8.5f}  bfloat16 {measured:8.5f}  less rounding ", end="")
        print(f"{measured - of_rounding:8.5f}", flush=True)
        errors[f"as_measured_{form}"].append(abs(measured - true))
        errors[f"less_rounding_{form}"].append(abs(measured - of_rounding - true))
    figures = {f"mean_error_{name}": sum(values) / len(values) for name, values in errors.items()}
    figures |= {f"largest_error_{name}": max(values) for name, values in errors.items()}
    report("score_precision", figures)
