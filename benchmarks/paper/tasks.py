"""Table 9: blocks scored by the task that a child is for, against KL. Half of the items choose, half report."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from dataclasses import asdict, replace

import torch

from benchmarks.common import CONTINUATIONS, task_items
from benchmarks.paper.common import KEPT, Budget, Children, Measured, table
from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.task_items import half_of
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.families import load_tokenizer, parent_checkpoint
from puzzle_nas.library import assemble
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.scoring.likelihood import encode_pair, log_likelihoods
from puzzle_nas.scoring.task_scores import TaskResult, TokenisedTask

SCORING_ITEMS = 32
SPEEDUPS = (1.1, 1.25, 1.5)


def scored_by_task(children: Children, run: RunFolder) -> ArchitectureSearch:
    """The run's search, with scores by what the task's margin loses, taken in `run`."""
    if not run.path.exists():
        unfinished = run.path.with_name(run.path.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        ignored = shutil.ignore_patterns("child*", "baselines", "exports", "search", "scratch", "download")
        shutil.copytree(children.run.path, unfinished, ignore=ignored, copy_function=os.link)
        unfinished.rename(run.path)
    settings = children.recipe.model_dump(mode="json")
    task = run.path.with_suffix(".jsonl")
    items = half_of(task_items(CONTINUATIONS), True, CONTINUATIONS)[:SCORING_ITEMS]
    task.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    settings["scoring"] |= {"metric": "task_margin", "task": str(task.resolve())}
    settings["search"]["effort"] = "fast"
    recipe = parse_recipe(json.dumps(settings))
    pipeline.run_stages(recipe, run, last="score-blocks")
    return replace(children.found, scores=ArchitectureSearch.load(recipe, run).scores)


def certainty(run: RunFolder, metric: str, field: str) -> float:
    """Median over all variants of how many standard errors their score is from zero."""
    found = [read_json(path)[field] for path in sorted((run / f"scores/main/{metric}").glob("*.json"))]
    return statistics.median(abs(score["mean"]) / score["standard_error"] for score in found)


@table(
    "table_09",
    "Table 9: scores on the target task",
    "half of MMLU",
    {"parent": "", "KL": 64.94, "the task": 66.24},
    "accuracy and margin on continuations",
)
def scores_by_task(budget: Budget) -> Measured:
    """Accuracy and margin on the half of the items that nothing was chosen on; children assembled, not distilled."""
    items = half_of(task_items(CONTINUATIONS), False, CONTINUATIONS)
    children, task_run = Children(budget), RunFolder(KEPT / f"{budget.name}-task")
    by_task = scored_by_task(children, task_run)
    tokenizer = load_tokenizer(parent_checkpoint(children.run))
    pairs = [encode_pair(tokenizer, item.question, f" {choice}") for item in items for choice in item.choices]
    task = TokenisedTask.of(items, tokenizer, None)

    def result(architecture=None) -> TaskResult:
        name = fingerprint(architecture.to_list()) if architecture else "parent"
        path = KEPT / f"{budget.name}-task-results/{name}.json"
        if not path.exists():
            model = assemble(children.run, children.parent, architecture) if architecture else children.parent
            write_json(path, [value for value, _ in log_likelihoods(Evaluated(model, tokenizer), pairs, None)])
        return task.measured(torch.tensor(read_json(path)))

    parent = result()
    columns: dict[str, dict[str, float]] = {}
    claims, differences = {}, []
    for speedup in SPEEDUPS:
        rows = {"KL": result(children.chosen(speedup)), "the task": result(children.chosen(speedup, by_task))}
        for what, scale, unit in (("accuracy", 100, "%"), ("margin", 1, "nats")):
            columns[f"{speedup}x {what}, {unit}"] = {
                row: scale * getattr(value, what).mean().item() for row, value in {"parent": parent, **rows}.items()
            }
            paired = scale * (getattr(rows["the task"], what) - getattr(rows["KL"], what))
            mean, error = paired.mean().item(), paired.std().item() / len(paired) ** 0.5
            claims[f"{speedup}x {what}: the task better than KL"] = mean > 0
            differences.append(f"{speedup}x {what} {mean:+.2f} +- {error:.2f} {unit}")
    chance = 100 * sum(1 / len(item.choices) for item in items) / len(items)
    gains = 100 * sum(score < 0 for score in by_task.scores.values()) / len(by_task.scores)
    by_items, by_kl = certainty(task_run, "task", "task_loss"), certainty(children.run, "kl", "kl_nats")
    remark = (
        f"{len(items)} items that nothing was chosen on; chance {chance:.1f} %. Scores from {SCORING_ITEMS} others, by "
        "margin (log-likelihood of the right choice less the likeliest wrong one). Paired differences with standard "
        f"errors: {'; '.join(differences)}. So few items say little: the median variant's score is {by_items:.1f} of "
        f"its standard errors from zero, by KL {by_kl:.1f}; {gains:.0f} % score as gains."
    )
    return Measured(columns, claims, remark)
