"""Parent + library + architecture -> checkpoints: child/, and one for each baseline in baselines/."""

from __future__ import annotations

import shutil
from pathlib import Path

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, fingerprint, read_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent, load_tokenizer, parent_checkpoint, save_model
from puzzle_nas.formats.stored import FILE, write_matrices
from puzzle_nas.library import assemble, rounded_already
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.training.refitting import room_for_goals, rounded


def run(recipe: Recipe, run: RunFolder) -> None:
    """Assemble the child and the baselines."""
    result = read_json(run.architecture(), "search-architecture")
    # Runs from before coupled BLD do not name the library.
    library = result.get("library", "main")
    parent = load_parent(recipe, run, by_layer=True)
    tokenizer = load_tokenizer(parent_checkpoint(run))
    targets: dict[Path, list] = {run / "child": result["architecture"]}
    for name, baseline in result["baselines"].items():
        if "architecture" in baseline:
            targets[run / "baselines" / name] = baseline["architecture"]
    calibration = load_tokens(run, "calibration")
    goals = room_for_goals(parent, calibration)
    made: dict[str, Path] = {}
    for folder, layers in targets.items():
        architecture = Architecture.from_list(layers)
        with complete_folder(folder) as partial:
            # Baselines may be the same model.
            if (same := made.get(fingerprint(layers))) is not None:
                shutil.copytree(same, partial, dirs_exist_ok=True)
                continue
            child = assemble(run, parent, architecture, library)
            if architecture.formats:
                already = rounded_already(run, parent, architecture)
                write_matrices(rounded(parent, child, calibration, already, goals), partial / FILE)
            save_model(child, tokenizer, partial)
            card = model_card(recipe.parent, architecture, __version__, "assembled from the block library")
            (partial / "README.md").write_text(card)
        made[fingerprint(layers)] = folder
