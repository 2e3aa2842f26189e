"""The paper's second step: coupled BLD on what good solutions use (Puzzle, section 2 and table 6).

A first search on the decoupled library gives several solutions. The attention and FFN variants that they use in a
layer are paired, every one with every other, and the pairs are trained on the block's output and scored as blocks.
Files: library/coupled/, scores/coupled/.
"""

from __future__ import annotations

import itertools

from puzzle_nas.architecture import SLOTS, ParentShape, Spec, choice_id
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.data.batches import block_order, load_tokens
from puzzle_nas.evaluation.scores import score_choices
from puzzle_nas.families import load_parent
from puzzle_nas.library import block_weights
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training import parallel
from puzzle_nas.training.block_distillation import distill_blocks
from puzzle_nas.training.block_steps import Job

NAME = "couple_blocks"
COMMAND = "couple-blocks"
NEEDS = ("score_blocks", "measure_costs")
SETTINGS = ("seed", "coupled_bld", "scoring", "search", "scenarios", "search_space", "engine")
OUTPUTS = ("library/coupled/*", "library/coupled/*/*", "scores/coupled/*/*")

Pair = tuple[Spec, ...]


def why_left_out(recipe: Recipe) -> str | None:
    """See `pipeline.STAGES`."""
    if recipe.coupled_bld.tokens:
        return None
    return "The recipe leaves coupled BLD out; ask for it with coupled_bld.tokens, such as coupled_bld.tokens=65536."


def run(recipe: Recipe, run: RunFolder) -> None:
    """Choose the pairs, train them, score them."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.from_first(lambda: _choose_pairs(recipe, run, shape))
    parallel.divide_threads()
    pairs = _pairs(recipe, run, shape)
    jobs = [[_job(run, parent, layer, pair) for pair in here] for layer, here in enumerate(pairs)]
    distill_blocks(recipe, recipe.coupled_bld, run, NAME, parent, load_tokens(run, "train"), jobs, block_order)
    choices = [(layer, pair) for layer, here in enumerate(pairs) for pair in here]
    score_choices(recipe, run, parent, NAME, "coupled", choices)


def _choose_pairs(recipe: Recipe, run: RunFolder, shape: ParentShape) -> None:
    """Write which pairs are trained; those of an interrupted run stay."""
    if run.coupled_pairs.exists():
        return
    settings = recipe.search
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, settings.limits, library="main")
    solutions = [
        found.architecture(solution)
        for solution in found.solve(
            settings.limits,
            settings.gap,
            settings.time_limit_seconds,
            recipe.coupled_bld.solutions,
            settings.min_different,
        )
    ]
    own = {shape.parent_spec(slot) for slot in SLOTS}
    used = [
        [dict.fromkeys(solution.layers[layer][slot] for solution in solutions) for slot in SLOTS]
        for layer in range(shape.num_hidden_layers)
    ]
    chosen = [[p for p in itertools.product(*slots) if _trains(p, own)] for slots in used]
    content = {
        "score_sums_of_solutions": [found.score_of(solution) for solution in solutions],
        "layers": [[choice_id(pair) for pair in here] for here in chosen],
    }
    write_json(run.coupled_pairs, content)
    console.print(f"  {sum(map(len, chosen))} pairs of what {len(solutions)} solutions use")


def _pairs(recipe: Recipe, run: RunFolder, shape: ParentShape) -> list[list[Pair]]:
    """The chosen pairs of each layer."""
    kept = read_json(run.coupled_pairs)["layers"]
    every = [itertools.product(*(slots[slot] for slot in SLOTS)) for slots in search_space_of(recipe, shape).options]
    return [[p for p in pairs if choice_id(p) in ids] for pairs, ids in zip(every, kept, strict=True)]


def _trains(pair: Pair, own: set[Spec]) -> bool:
    """Whether there is something to train, and a reason to."""
    return not own.issuperset(pair) and not all(spec.empty for spec in pair)


def _job(run: RunFolder, parent: PuzzleForCausalLM, layer: int, pair: Pair) -> Job:
    path = run.variant(layer, choice_id(pair), "coupled")
    return Job(pair, path, lambda: block_weights(run, parent, layer, pair), {"initialisation": "decoupled"})
