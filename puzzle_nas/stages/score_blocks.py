"""Replace-1-block scores of every variant (Puzzle, section 3). Files: scores/main/METRIC/layer_NN.VARIANT.json."""

from __future__ import annotations

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.scoring.scores import score_choices
from puzzle_nas.training import parallel

NAME = __name__.rpartition(".")[2]


def run(recipe: Recipe, run: RunFolder) -> None:
    """Score every variant of every layer in the parent, and name those that are not fit to be chosen."""
    parent = load_parent(recipe, run, by_layer=True)
    parallel.divide_threads()
    space = search_space_of(recipe, architecture_of(parent.config))
    score_choices(recipe, run, parent, NAME, "main", space.scored(by_block=recipe.scoring.unit == "block"))
