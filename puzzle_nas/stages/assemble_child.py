"""Parent + library + architecture -> checkpoints: child/, and one for each baseline in baselines/."""

from __future__ import annotations

from pathlib import Path

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json
from puzzle_nas.families import load_parent, load_tokenizer, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.library import assemble
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card

NAME = "assemble_child"
COMMAND = "assemble"
NEEDS = ("search_architecture",)
SETTINGS = ()
OUTPUTS = ("child/*", "baselines/*/*")


def run(recipe: Recipe, run: RunFolder) -> None:
    """Assemble the child and the baselines."""
    result = read_json(run.architecture(), "search")
    # Runs from before coupled BLD do not name the library.
    library = result.get("library", "main")
    parent, _ = load_parent(run, by_layer=True)
    tokenizer = load_tokenizer(parent_checkpoint(run))
    targets: dict[Path, list] = {run / "child": result["architecture"]}
    for name, baseline in result["baselines"].items():
        if "architecture" in baseline:
            targets[run / "baselines" / name] = baseline["architecture"]
    for folder, layers in targets.items():
        architecture = Architecture.from_list(layers)
        with complete_folder(folder) as partial:
            save_model(assemble(run, parent, architecture, library), tokenizer, partial)
            card = model_card(recipe.parent, architecture, __version__, "assembled from the block library")
            (partial / "README.md").write_text(card)
