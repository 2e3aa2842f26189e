"""Closed-form correction of the assembled child, kept if it lowers KL on the selection split. File: child-refit/."""

from __future__ import annotations

import shutil

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent, load_tokenizer, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.formats.stored import FILE, write_matrices
from puzzle_nas.library import assemble, rounded_ends_of
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.training.refitting import refit_if_better


def run(recipe: Recipe, run: RunFolder) -> None:
    """Refit a copy; keep it if it is better on the selection split."""
    shutil.rmtree(run / "child-refit", ignore_errors=True)
    if not recipe.refit:
        write_json(run / "refit.json", {"tried": False, "kept": False})
        return
    parent = load_parent(recipe, run, by_layer=True)
    reference = ParentReference(parent, load_tokens(run, "selection"))
    found = read_json(run.architecture())
    architecture = Architecture.from_list(found["architecture"])
    child, calibration = assemble(run, parent, architecture, found["library"]), load_tokens(run, "calibration")
    ends = rounded_ends_of(run, parent, architecture)
    with progress("refit, layer", parent.config.num_hidden_layers) as ticker:
        better, stored, kl = refit_if_better(parent, child, reference, calibration, ticker.advance, already=ends)
    if kl.kept:
        with complete_folder(run / "child-refit") as partial:
            save_model(better, load_tokenizer(parent_checkpoint(run)), partial)
            write_matrices(stored, partial / FILE)
            how = "assembled from the block library, then refitted in closed form"
            (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "refit.json",
        {
            "tried": True,
            "kept": kl.kept,
            "selection_kl_nats_before": kl.before,
            "selection_kl_nats_after": kl.after,
        },
    )
