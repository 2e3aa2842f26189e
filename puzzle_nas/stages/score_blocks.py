"""Replace-1-block scores of every variant (Puzzle, section 3). Files: scores/main/METRIC/layer_NN.VARIANT.json."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from puzzle_nas.architecture import SLOTS, choice_id
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.evaluation.task_scores import TaskWalk, TokenisedTask, task_score
from puzzle_nas.families import load_parent, load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.library import variant_layer
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.training.losses import Divergence
from puzzle_nas.training.replacement import ReplacementWalk

NAME = "score_blocks"
COMMAND = "score-blocks"
NEEDS = ("distill_blocks",)
SETTINGS = ("scoring",)
OUTPUTS = ("scores/main/*/*.json",)


def summarise(values_S: torch.Tensor) -> dict[str, float]:
    """Mean and standard error over sequences."""
    count = len(values_S)
    error = (values_S.std() / count**0.5).item() if count > 1 else 0.0
    return {"mean": values_S.mean().item(), "standard_error": error}


def divergence_score(divergence: Divergence, parent: Divergence) -> dict:
    """The JSON of one variant. All figures are means over the tokens of a sequence, then over sequences."""
    kl = divergence.kl_nats.double().mean(1)
    # The last position of a sequence has no label.
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean(1)
    increase = lm_loss - parent.lm_loss_nats[:, :-1].double().mean(1)
    return {
        "kl_nats": summarise(kl),
        "lm_loss_increase_nats": summarise(increase),
        "top1_agreement": summarise(divergence.top1_agrees.double().mean(1)),
        "kl_nats_by_sequence": [round(v, 8) for v in kl.tolist()],
        "lm_loss_increase_nats_by_sequence": [round(v, 8) for v in increase.tolist()],
    }


def _walk(recipe: Recipe, run: RunFolder, parent: PuzzleForCausalLM) -> tuple[ReplacementWalk, Callable[..., dict]]:
    """What is walked, and the JSON of what it finds."""
    settings = recipe.scoring
    if settings.task is None:
        return ReplacementWalk(parent, load_tokens(run, "scoring"), settings.batch_tokens), divergence_score
    items = half_of(read_task(settings.task), True, settings.task)[: settings.task_items]
    task = TokenisedTask.of(items, load_tokenizer(parent_checkpoint(run)), parent.config.max_position_embeddings)
    return TaskWalk(parent, task, settings.batch_tokens), partial(task_score, measure=settings.task_measure)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Score every variant of every layer in the parent."""
    parent, shape = load_parent(run)
    space = search_space_of(recipe, shape)
    metric = recipe.scoring.metric
    with progress("score blocks, layer", shape.num_hidden_layers) as ticker:
        walk, score_of = _walk(recipe, run, parent)
        parent_scores: Any = None
        own = {shape.parent_spec(slot) for slot in SLOTS}
        choices = list(space.choices(by_block=recipe.scoring.unit == "block"))
        for index in range(shape.num_hidden_layers):
            paths = {
                specs: run.score(index, choice_id(specs), metric=metric)
                for layer, specs in choices
                if layer == index and not own.issuperset(specs)
            }
            missing = [specs for specs, path in paths.items() if not path.exists()]
            if missing:
                if parent_scores is None:
                    parent_scores = walk.model_itself()
                blocks = {
                    spec: variant_layer(run, parent, index, spec)
                    for spec in dict.fromkeys(itertools.chain.from_iterable(missing))
                }
                replacements = [{spec.slot: blocks[spec] for spec in specs} for specs in missing]
                for specs, divergence in zip(missing, walk.try_variants(replacements), strict=True):
                    write_json(paths[specs], score_of(divergence, parent_scores))
                ticker.advance()
            else:
                ticker.skip(1)
            if index + 1 < shape.num_hidden_layers:
                walk.advance()
