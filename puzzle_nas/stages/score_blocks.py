"""Replace-1-block scores of every variant (Puzzle, section 3). Files: scores/main/METRIC/layer_NN.VARIANT.json."""

from __future__ import annotations

from puzzle_nas.architecture import SLOTS
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.evaluation.scores import score_choices
from puzzle_nas.families import load_parent
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training import parallel

NAME = "score_blocks"
COMMAND = "score-blocks"
NEEDS = ("distill_blocks",)
SETTINGS = ("scoring",)
OUTPUTS = ("scores/main/*/*.json",)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Score every variant of every layer in the parent, and name those that are not fit to be chosen."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.divide_threads()
    own = {shape.parent_spec(slot) for slot in SLOTS}
    every = search_space_of(recipe, shape).choices(by_block=recipe.scoring.unit == "block")
    choices = [(layer, specs) for layer, specs in every if not own.issuperset(specs)]
    score_choices(recipe, run, parent, NAME, "main", choices)
