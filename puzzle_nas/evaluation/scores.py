"""Replace-1-block scores: what is walked, and what is stored.

Shapes: S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.evaluation.task_scores import TaskWalk, TokenisedTask, task_score
from puzzle_nas.families import load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.recipe import Recipe
from puzzle_nas.training import parallel
from puzzle_nas.training.losses import Divergence
from puzzle_nas.training.replacement import ReplacementWalk


def scoring_walk(
    recipe: Recipe, run: RunFolder, parent: PuzzleForCausalLM, stage: str
) -> tuple[ReplacementWalk, Callable[..., dict]]:
    """What is walked, and what makes the JSON of a variant from its result and the parent's.

    Args:
        stage: whose scratch folder to use where the recipe streams the parent.
    """
    settings = recipe.scoring
    scratch = run.scratch(stage) / f"rank_{parallel.rank()}" if recipe.memory == "stream" else None
    if settings.task is None:
        tokens = load_tokens(run, "scoring")
        return ReplacementWalk(parent, tokens, settings.batch_tokens, scratch=scratch), divergence_score
    items = half_of(read_task(settings.task), True, settings.task)[: settings.task_items]
    task = TokenisedTask.of(items, load_tokenizer(parent_checkpoint(run)), parent.config.max_position_embeddings)
    walk = TaskWalk(parent, task, settings.batch_tokens, scratch=scratch)
    return walk, partial(task_score, measure=settings.task_measure)


def summarise(values_S: torch.Tensor) -> dict[str, float | None]:
    """Mean and standard error over sequences; None for what is not finite."""
    count = len(values_S)
    error = (values_S.std() / count**0.5).item() if count > 1 else 0.0
    return {"mean": _finite(values_S.mean().item()), "standard_error": _finite(error)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
        "kl_nats_by_sequence": [_finite(round(v, 8)) for v in kl.tolist()],
        "lm_loss_increase_nats_by_sequence": [_finite(round(v, 8)) for v in increase.tolist()],
    }


def problem_of(score: dict, adds_nothing: bool = False) -> dict[str, str]:
    """Why something must not be chosen, as `problem`; empty for what may."""
    if any(isinstance(figure, dict) and figure["mean"] is None for figure in score.values()):
        return {"problem": "its score is not a finite number"}
    return {"problem": "it has weights and adds nothing"} if adds_nothing else {}
