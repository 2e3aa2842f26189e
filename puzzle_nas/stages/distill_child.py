"""Global knowledge distillation (Puzzle, section 4): the whole child learns from the parent. File: child-gkd/."""

from __future__ import annotations

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.errors import RecipeError
from puzzle_nas.families import (
    load_model,
    load_tokenizer,
    save_model,
)
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.formats.stored import FILE, read_matrices, write_matrices
from puzzle_nas.machine import machine_of
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.training import parallel
from puzzle_nas.training.distillation import Training, parent_outputs


def run(recipe: Recipe, run: RunFolder) -> None:
    """Distil; the best checkpoint on the selection split is the result."""
    refitted = read_json(run / "refit.json", "refit-child")["kept"]
    parent = parent_outputs(recipe, run)
    folder = run / ("child-refit" if refitted else "child")
    matrices = read_matrices(folder / FILE)
    if matrices and recipe.gkd.tokens and parallel.world_size() > 1:
        parallel.stop(RecipeError("A child in formats is distilled by one process; start puzzle without torchrun."))
    start = load_model(folder, machine_of(recipe))
    parallel.divide_threads()
    training = Training(recipe, run, parent, start, matrices)
    training.train()
    if not parallel.is_first():
        return
    start_kl, best = training.curve[0]["selection_kl_nats"], training.best
    if not best["step"] and recipe.gkd.tokens:
        console.print(
            f"  GKD lowered KL at no step (start {start_kl:.4f} nats on the selection split): "
            "the child stays as it was."
        )
    result = training.finish()
    architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
    with complete_folder(run / "child-gkd") as partial:
        save_model(result.eval(), load_tokenizer(parent_checkpoint(run)), partial)
        write_matrices(training.matrices, partial / FILE)
        refit = "refit, " if refitted else ""
        how = f"block library, search, {refit}then {recipe.gkd.tokens} tokens of global distillation"
        (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "gkd.json",
        {
            "tokens": recipe.gkd.tokens,
            "best_step": best["step"],
            "selection_kl_nats_start": start_kl,
            "selection_kl_nats_best": best["selection_kl_nats"],
            "curve": training.curve,
        },
    )
