"""Replace-1-block scores of every variant (Puzzle, section 3). Files: scores/main/METRIC/layer_NN.VARIANT.json."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from puzzle_nas.architecture import SLOTS, choice_id
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.evaluation.scores import problem_of, scoring_walk
from puzzle_nas.evaluation.task_scores import TaskWalk
from puzzle_nas.families import load_parent
from puzzle_nas.library import variant_layer
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training import parallel

NAME = "score_blocks"
COMMAND = "score-blocks"
NEEDS = ("distill_blocks",)
SETTINGS = ("scoring",)
OUTPUTS = ("scores/main/*/*.json",)


def _adds_nothing(block: PuzzleDecoderLayer, hidden_BTD: torch.Tensor, inputs: Mapping[str, Any]) -> bool:
    """Whether a sub-block that is not empty gives zeros only."""
    if block.mlp is not None:
        return not block.mlp(block.post_attention_layernorm(hidden_BTD)).any()
    if block.self_attn is None:
        return False
    masks = {**inputs, "attention_mask": inputs["attention_mask"].get(block.layer_type)}
    return not block.self_attn(block.input_layernorm(hidden_BTD), **masks)[0].any()


def run(recipe: Recipe, run: RunFolder) -> None:
    """Score every variant of every layer in the parent, and name those that are not fit to be chosen."""
    parent, shape = load_parent(run, by_layer=True)
    parallel.divide_threads()
    metric = recipe.scoring.metric
    own = {shape.parent_spec(slot) for slot in SLOTS}
    paths = {
        (layer, specs): run.score(layer, choice_id(specs), metric=metric)
        for layer, specs in search_space_of(recipe, shape).choices(by_block=recipe.scoring.unit == "block")
        if not own.issuperset(specs)
    }
    mine = parallel.share([choice for choice, path in paths.items() if not path.exists()])
    with progress("score blocks, layer", shape.num_hidden_layers) as ticker:
        walk, score_of = scoring_walk(recipe, run, parent, NAME)
        parent_scores: Any = None
        for index in range(shape.num_hidden_layers):
            missing = [specs for layer, specs in mine if layer == index]
            if missing:
                if parent_scores is None:
                    parent_scores = walk.model_itself()
                    if isinstance(walk, TaskWalk) and (doubt := walk.task.doubt(parent_scores)):
                        console.print(f"  {doubt}")
                blocks = {
                    spec: variant_layer(run, parent, index, spec)
                    for spec in dict.fromkeys(itertools.chain.from_iterable(missing))
                }
                replacements = [{spec.slot: blocks[spec] for spec in specs} for specs in missing]
                with torch.inference_mode():
                    some = walk.hidden_STD[:1].to(parent.device)
                    dead = {spec for spec, block in blocks.items() if _adds_nothing(block, some, walk.inputs)}
                for specs, divergence in zip(missing, walk.try_variants(replacements), strict=True):
                    score = score_of(divergence, parent_scores)
                    write_json(paths[index, specs], score | problem_of(score, not dead.isdisjoint(specs)))
                ticker.advance()
            else:
                ticker.skip(1)
            if index + 1 < shape.num_hidden_layers:
                walk.advance()
    parallel.gathered(())
    for (index, specs), path in paths.items():
        if problem := read_json(path).get("problem"):
            console.print(f"  Layer {index}, {choice_id(specs)}: {problem}; it is never chosen.")
