"""Global knowledge distillation (Puzzle, section 4): the whole child learns from the parent. File: child-gkd/."""

from __future__ import annotations

import math
from collections.abc import Mapping

from transformers import PreTrainedModel

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.errors import RecipeError
from puzzle_nas.families import load_model, load_parent, load_tokenizer, parent_checkpoint, save_model
from puzzle_nas.formats.stored import FILE, Matrix, read_matrices, write_matrices
from puzzle_nas.machine import machine_of
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.training import parallel
from puzzle_nas.training.distillation import Training, not_a_number, parent_outputs


def run(recipe: Recipe, run: RunFolder) -> None:
    """Distil; the best checkpoint on the selection split is the result."""
    refitted = read_json(run / "refit.json", "refit-child")["kept"]
    folder = run / ("child-refit" if refitted else "child")
    start, matrices = load_model(folder, machine_of(recipe)), read_matrices(folder / FILE)
    if recipe.gkd.tokens:
        result, matrices, curve = _distilled(recipe, run, start, matrices)
    else:
        result, curve = start, [{"step": 0, "selection_kl_nats": _kl(recipe, run, start)}]
    if not parallel.is_first():
        return
    start_kl, best = curve[0]["selection_kl_nats"], min(curve, key=lambda point: point["selection_kl_nats"])
    architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
    with complete_folder(run / "child-gkd") as partial:
        save_model(result.eval(), load_tokenizer(parent_checkpoint(run)), partial)
        write_matrices(matrices, partial / FILE)
        how = "block library, search" + (", refit" if refitted else "")
        how += f", then {recipe.gkd.tokens} tokens of global distillation" if recipe.gkd.tokens else ""
        (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "gkd.json",
        {
            "tokens": recipe.gkd.tokens,
            "best_step": best["step"],
            "selection_kl_nats_start": start_kl,
            "selection_kl_nats_best": best["selection_kl_nats"],
            "curve": curve,
        },
    )


def _distilled(
    recipe: Recipe, run: RunFolder, start: PreTrainedModel, matrices: Mapping[str, Matrix]
) -> tuple[PreTrainedModel, Mapping[str, Matrix], list[dict[str, float]]]:
    """The child at its best step, what it stores in formats, and KL on the selection split by step."""
    if matrices and parallel.world_size() > 1:
        parallel.stop(RecipeError("A child in formats is distilled by one process; start puzzle without torchrun."))
    parent = parent_outputs(recipe, run)
    parallel.divide_threads()
    training = Training(recipe, run, parent, start, matrices)
    training.train()
    if not parallel.is_first():
        return start, matrices, training.curve
    if not training.best["step"]:
        console.print(
            f"  GKD lowered KL at no step (start {training.best['selection_kl_nats']:.4f} nats on the selection "
            "split): the child stays as it was."
        )
    return training.finish(), training.matrices, training.curve


def _kl(recipe: Recipe, run: RunFolder, child: PreTrainedModel) -> float:
    """On the selection split, in nats; one process computes it."""
    reference = ParentReference(load_parent(recipe, run), load_tokens(run, "selection"))
    kl = parallel.from_first(lambda: reference.compare(child).kl_nats)
    if not math.isfinite(kl):
        parallel.stop(not_a_number(run))
    return kl
