"""The paper's second step: coupled BLD on what good solutions use (Puzzle, section 2 and table 6).

A first search on the decoupled library gives several solutions. The attention and FFN variants that they use in a
layer are paired, every one with every other, and the pairs are trained on the block's output and scored as blocks.
Files: library/coupled/, scores/coupled/.
"""

from __future__ import annotations

import itertools

from transformers import PreTrainedModel

from puzzle_nas.architecture import Choice, choice_id
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.effort import MIN_DIFFERENT
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.library import block_weights
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.scoring.scores import score_choices
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import Spec
from puzzle_nas.training import parallel
from puzzle_nas.training.block_distillation import distill_blocks
from puzzle_nas.training.block_steps import Job

NAME = __name__.rpartition(".")[2]

Pair = tuple[Spec, ...]


def run(recipe: Recipe, run: RunFolder) -> None:
    """Choose the pairs, train them, score them."""
    parent = load_parent(recipe, run, by_layer=True)
    space = search_space_of(recipe, architecture_of(parent.config))
    parallel.from_first(lambda: _choose_pairs(recipe, run, space))
    parallel.divide_threads()
    pairs = _pairs(run, space)
    jobs = [[_job(run, parent, layer, pair) for pair in here] for layer, here in enumerate(pairs)]
    distill_blocks(recipe, recipe.bld.coupled_tokens, run, NAME, parent, load_tokens(run, "train"), jobs, block_order)
    choices = [(layer, pair) for layer, here in enumerate(pairs) for pair in here]
    score_choices(recipe, run, parent, NAME, "coupled", choices)


def _choose_pairs(recipe: Recipe, run: RunFolder, space: SearchSpace) -> None:
    """Write which pairs are trained; those of an interrupted run stay."""
    if run.coupled_pairs.exists():
        return
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, recipe.search.limits, library="main")
    solutions = [
        found.architecture(solution)
        for solution in found.solve(
            recipe.search.limits, num_solutions=recipe.bld.coupled_solutions, min_different=MIN_DIFFERENT
        )
    ]
    used = [
        [dict.fromkeys(solution.layers[layer][slot] for solution in solutions) for slot in slots]
        for layer, slots in enumerate(space.options)
    ]
    chosen = [[p for p in itertools.product(*slots) if _trains((i, p), space)] for i, slots in enumerate(used)]
    content = {
        "score_sums_of_solutions": [found.score_of(solution) for solution in solutions],
        "layers": [[choice_id(pair) for pair in here] for here in chosen],
    }
    write_json(run.coupled_pairs, content)
    console.print(f"  {sum(map(len, chosen))} pairs of what {len(solutions)} solutions use")


def _pairs(run: RunFolder, space: SearchSpace) -> list[list[Pair]]:
    """The chosen pairs of each layer."""
    kept = read_json(run.coupled_pairs)["layers"]
    every = [itertools.product(*slots.values()) for slots in space.options]
    return [[p for p in pairs if choice_id(p) in ids] for pairs, ids in zip(every, kept, strict=True)]


def _trains(choice: Choice, space: SearchSpace) -> bool:
    """Whether there is something to train, and a reason to."""
    return not space.is_parents(choice) and not all(spec.empty for spec in choice[1])


def _job(run: RunFolder, parent: PreTrainedModel, layer: int, pair: Pair) -> Job:
    path = run.variant(layer, choice_id(pair), "coupled")
    return Job(pair, path, lambda: block_weights(run, parent, layer, pair), {"initialisation": "decoupled"})
