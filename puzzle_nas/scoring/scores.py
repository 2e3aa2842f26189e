"""Replace-1-block scores: what is walked, who scores what, and what is stored.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from puzzle_nas.architecture import Choice, choice_id
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.estimates import estimate, finite
from puzzle_nas.families import Anatomy, load_tokenizer, parent_checkpoint
from puzzle_nas.library import block_subblocks, read_variant, with_ends
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.replacement import ReplacementWalk, batch_tokens_of, rounding_counts
from puzzle_nas.scoring.task_scores import TaskWalk, TokenisedTask, task_score
from puzzle_nas.specs import Spec
from puzzle_nas.subblocks import windows_of
from puzzle_nas.training import parallel
from puzzle_nas.training.losses import Divergence


def scoring_walk(
    recipe: Recipe,
    run: RunFolder,
    parent: PreTrainedModel,
    stage: str,
    windows: Sequence[int] = (),
    model: PreTrainedModel | None = None,
) -> tuple[ReplacementWalk, Callable[..., dict]]:
    """What is walked, and what makes the JSON of a variant from its result and the parent's.

    Args:
        stage: whose scratch folder to use where the recipe streams the parent.
        windows: of attention among what will be tried.
        model: what is walked instead of the parent, and compared with it.
    """
    settings = recipe.scoring
    scratch = run.scratch(stage) / f"rank_{parallel.rank()}" if recipe.memory == "stream" else None
    if settings.task is None:
        tokens = load_tokens(run, "scoring")
        walk = ReplacementWalk(parent, tokens, batch_tokens_of(parent), model, scratch, windows)
        return walk, divergence_score
    items = half_of(read_task(settings.task), True, settings.task)
    task = TokenisedTask.of(items, load_tokenizer(parent_checkpoint(run)), parent.config.max_position_embeddings)
    walk = TaskWalk(parent, task, batch_tokens_of(parent), model, scratch, windows)
    return walk, partial(task_score, measure=settings.metric.removeprefix("task_"))


def score_choices(
    recipe: Recipe, run: RunFolder, parent: PreTrainedModel, stage: str, library: str, choices: Iterable[Choice]
) -> None:
    """Score in the parent what is not scored yet, and name what is not fit to be chosen.

    Args:
        stage: whose scratch folder to use.
        library: where the blocks are from.
    """
    paths = {(layer, s): run.score(layer, choice_id(s), library, recipe.scoring.metric) for layer, s in choices}
    missing = parallel.from_first(lambda: [choice for choice, path in paths.items() if not path.exists()])
    mine = missing[parallel.rank() :: parallel.world_size()]
    if mine:
        windows = windows_of(spec for _, specs in mine for spec in specs)
        walk, score_of = scoring_walk(recipe, run, parent, stage, windows)
        itself: Any = walk.model_itself()
        if isinstance(walk, TaskWalk) and (doubt := walk.task.doubt(itself)):
            console.print(f"  {doubt}")
        with progress("score blocks, layer", len(walk.layers)) as ticker:
            for layer in walk.layers:
                here = [specs for index, specs in mine if index == layer]
                if not here:
                    ticker.skip(1)
                    continue
                results, dead, rounding = _tried(run, walk, layer, here, library)
                for specs, result, is_dead in zip(here, results, dead, strict=True):
                    score = score_of(result, itself, *rounding)
                    write_json(paths[layer, specs], score | problem_of(score, is_dead))
                ticker.advance()
        heads = [choice for choice in mine if choice[0] == len(Anatomy(parent).layers)]
        rounding = []
        if heads and rounding_counts(parent):
            parents, _ = scoring_walk(recipe, run, parent, stage)
            rounding = parents.try_variants(parents.rounded_otherwise())
        for layer, (head,) in heads:
            ends = read_variant(run.variant(layer, head.id, library), "build-library")
            walk, _ = scoring_walk(recipe, run, parent, stage, model=with_ends(parent, ends))
            write_json(paths[layer, (head,)], score_of(walk.model_itself(), itself, *rounding))
    parallel.gathered(())
    for (layer, specs), path in paths.items():
        if problem := read_json(path).get("problem"):
            console.print(f"  Layer {layer}, {choice_id(specs)}: {problem}; it is never chosen.")


def _tried(
    run: RunFolder, walk: ReplacementWalk, layer: int, choices: Sequence[tuple[Spec, ...]], library: str
) -> tuple[Sequence[Any], list[bool], Sequence[Any]]:
    """The results of choices at a layer; of each whether it is dead; and the result of rounding alone, where that
    counts."""
    walk.climb_to(layer)
    blocks = block_subblocks(run, walk.parent, layer, choices, library)
    with torch.inference_mode():
        some, inputs = walk.hidden_STD[:1].to(walk.parent.device), walk.inputs[layer]
        dead = [
            any(not part.empty and not bool(part.added(some, inputs).any()) for part in parts.values())
            for parts in blocks
        ]
    results = walk.try_variants([*blocks, *walk.rounded_otherwise()])
    return results[: len(choices)], dead, results[len(choices) :]


def divergence_score(divergence: Divergence, parent: Divergence, rounding: Divergence | None = None) -> dict:
    """The JSON of one variant. All figures are means over the tokens of a sequence, then over sequences.

    Args:
        rounding: what the same text loses where the parent is only rounded otherwise (`RoundedOtherwise`). Damage adds
            to it, so it is taken off the KL.
    """
    kl = divergence.kl_nats.double().mean(1)
    of_rounding = torch.zeros_like(kl) if rounding is None else rounding.kl_nats.double().mean(1)
    kl = (kl - of_rounding).tolist()
    # The last position of a sequence has no label.
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean(1)
    increase = (lm_loss - parent.lm_loss_nats[:, :-1].double().mean(1)).tolist()
    return {
        "kl_nats": estimate(kl),
        "kl_nats_of_rounding": finite(of_rounding.mean().item()),
        "lm_loss_increase_nats": estimate(increase),
        "top1_agreement": estimate(divergence.top1_agrees.double().mean(1).tolist()),
        "kl_nats_by_sequence": [finite(round(v, 8)) for v in kl],
        "lm_loss_increase_nats_by_sequence": [finite(round(v, 8)) for v in increase],
    }


def problem_of(score: dict, adds_nothing: bool = False) -> dict[str, str]:
    """Why something must not be chosen, as `problem`; empty for what may."""
    if any(isinstance(figure, dict) and figure["mean"] is None for figure in score.values()):
        return {"problem": "its score is not a finite number"}
    return {"problem": "it has weights and adds nothing"} if adds_nothing else {}
