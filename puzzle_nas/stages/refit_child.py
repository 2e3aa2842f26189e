"""Closed-form correction of the assembled child, kept if it lowers KL on the selection split. File: child-refit/."""

from __future__ import annotations

import copy
import math
import shutil

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, load_tokenizer, machine_of, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.refitting import refit

NAME = "refit_child"
COMMAND = "refit"
NEEDS = ("assemble_child",)
SETTINGS = ("refit",)
OUTPUTS = ("refit.json", "child-refit/*")


def run(recipe: Recipe, run: RunFolder) -> None:
    """Refit a copy; keep it if it is better on the selection split."""
    shutil.rmtree(run / "child-refit", ignore_errors=True)
    if not recipe.refit.enabled:
        write_json(run / "refit.json", {"tried": False, "kept": False})
        return
    parent, shape = load_parent(run, by_layer=True)
    child = load_model(run / "child", machine_of(recipe))
    reference = ParentReference(parent, load_tokens(run, "selection"))
    before = reference.compare(child).kl_nats
    refitted = copy.deepcopy(child)
    with progress("refit, layer", shape.num_hidden_layers) as ticker:
        refit(parent, refitted, load_tokens(run, "calibration"), recipe.refit.ridge_tokens, ticker.advance)
    after = reference.compare(refitted).kl_nats
    kept = after < before
    if kept:
        architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
        with complete_folder(run / "child-refit") as partial:
            save_model(refitted, load_tokenizer(parent_checkpoint(run)), partial)
            how = "assembled from the block library, then refitted in closed form"
            (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "refit.json",
        {
            "tried": True,
            "kept": kept,
            "selection_kl_nats_before": before,
            "selection_kl_nats_after": after if math.isfinite(after) else None,
        },
    )
