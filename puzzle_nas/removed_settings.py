"""Settings that earlier versions had: a recipe that still names one is told what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ADAMW = "AdamW trains, which Muon did not beat in the same time (docs/results.md); leave it out"

CONSTANT = "it is now always what its default was; leave it out"
TRAINING_CONSTANTS = ("betas", "weight_decay", "warmup_fraction", "gradient_clip", "final_learning_rate_fraction")

REMOVED: dict[str, str] = {
    **{f"{section}.{name}": CONSTANT for section in ("bld", "gkd") for name in TRAINING_CONSTANTS},
    "bld.optimiser": ADAMW,
    "coupled_bld.tokens": "set bld.coupled_tokens",
    "coupled_bld.solutions": "set bld.coupled_solutions",
    "coupled_bld": "pairs train with the settings of bld; leave it out",
    "gkd.optimiser": ADAMW,
    "library.ridge": CONSTANT,
    "refit.enabled": "write refit: true or refit: false in its place",
    "refit.ridge_tokens": CONSTANT,
    "evaluation": "timings are repeated 5 to 15 times, as long as they differ; leave it out",
    "gkd.kl_weight": "set it in gkd.losses, {kl: 1.0, cosine: 1.0} by default",
    "gkd.cosine_weight": "set it in gkd.losses, {kl: 1.0, cosine: 1.0} by default",
    "gkd.lm_weight": "set it in gkd.losses, such as {kl: 1.0, cosine: 1.0, lm: 0.1}",
    "gkd.train_embeddings": "name embeddings in gkd.also_train",
    "gkd.train_experts": "name experts in gkd.also_train",
    "gkd.lora_rank": "train adapters of the exported child with peft; leave it out",
    "memory=divide": "set memory: stream",
    "bld.normalise": CONSTANT,
    "data.sample_tokens": "the parent writes as much as the share of parent-samples is; leave it out",
    "scoring.task_items": "shorten the file that scoring.task names",
    "scenarios.batch_size=sweep": "list the sizes, such as [1, 2, 4, 8, 16, 32]",
    "scenarios.max_batch_size": "list the sizes in batch_size, such as [1, 2, 4, 8, 16, 32]",
    "bld.checkpoint_every_steps": "checkpoints come every 200 steps; leave it out",
    "gkd.evaluate_every_steps": "the child is measured about eight times in a run; leave it out",
    "scoring.metric=task": "write task_margin, or task_accuracy for the share answered right",
    "scoring.task_measure": "set scoring.metric to task_margin or task_accuracy",
    "scoring.batch_tokens": "leave it out; where memory is short, set memory: stream",
    "costs.repeats": "leave it out; how often a model is timed depends on the engine",
    "costs.decode_steps_measured": "leave it out; how many steps are timed depends on the engine",
    "search_space.multiple_of": "leave it out; widths are multiples of 32, in very narrow parents of less",
    "search_space.attention_linear": "list attention in search_space.linear, or leave it out there",
    "search_space.ffn_linear": "list ffn in search_space.linear, or leave it out there",
    "search_space.attention_no_op": "list attention in search_space.no_op, or leave it out there",
    "search_space.ffn_no_op": "list ffn in search_space.no_op, or leave it out there",
    "search.verify": "set search.effort, and children are measured unless it is fast",
    "search.removed_runs": "set search.effort, and children without a run of layers are tried unless it is fast",
    "search.refine_rounds": "set search.effort; scores are taken again once with normal, twice with thorough",
    "search.speed_attempts": "leave it out; only costs that come from costs.file are trusted untimed",
    "search.gap": "leave it out, or give it to a search of its own: puzzle search RUN --gap GAP",
    "search.time_limit_seconds": "leave it out, or give it to puzzle search RUN --time-limit-seconds SECONDS",
    "search.min_different": "leave it out; candidates differ in eight positions",
}
"""By dotted name, without the places of list entries: what to do instead, as the rest of a sentence. A section's name
stands for all in it that has no line of its own, `name=value` for one value of a setting."""


def what_is_removed(data: Any) -> str | None:
    """The sentence about the first setting in a recipe's data that is gone; None where there is none."""
    for shown, name, value in _settings(data):
        for key in (f"{name}={value}", name):
            if key in REMOVED:
                what = f"{shown}: {value} is no longer possible" if "=" in key else f"{shown} is no longer a setting"
                return f"The recipe's {what}: {REMOVED[key]}."
    return None


def _settings(data: Any, shown: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """As written, as in `REMOVED`, and the value; what is in a section comes before the section itself."""
    is_list = isinstance(data, list)
    for key, value in enumerate(data) if is_list else data.items() if isinstance(data, dict) else ():
        place = f"{shown}.{key}".lstrip(".")
        inner = name if is_list else f"{name}.{key}".lstrip(".")
        yield from _settings(value, place, inner)
        if not is_list:
            yield place, inner, value
