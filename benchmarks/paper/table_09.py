"""Puzzle, table 9: blocks scored by the task that a child is for, against KL. Half of the items choose, half report."""

import json
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.paper.common import Budget, Children, Measured, Table
from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.families import load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.library import assemble
from puzzle_nas.recipe import parse_recipe
from puzzle_nas.scoring.likelihood import encode_pair, log_likelihoods
from puzzle_nas.scoring.task_scores import TaskResult, TokenisedTask

TASK = Path("runs/benchmark-tasks/continuations.jsonl")
"""Of the files at hand the one that the parent can do (benchmarks/continuations.py, which writes it)."""
SCORING_ITEMS = 32
SPEEDUPS = (1.1, 1.25, 1.5)
PAPER = {"parent": "", "KL": 64.94, "the task": 66.24}


def scored_by_task(children: Children) -> ArchitectureSearch:
    """The run's search, with scores by what the task's margin loses."""
    run = RunFolder(Path(f"runs/benchmark-paper/{children.budget.name}-task"))
    if not run.path.exists():
        unfinished = run.path.with_name(run.path.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        ignored = shutil.ignore_patterns("child*", "baselines", "exports", "search", "scratch", "download")
        shutil.copytree(children.run.path, unfinished, ignore=ignored, copy_function=os.link)
        unfinished.rename(run.path)
    settings = children.recipe.model_dump(mode="json")
    settings["scoring"] |= {"metric": "task", "task": str(TASK.resolve()), "task_items": SCORING_ITEMS}
    settings["search"] |= {"verify": 1, "removed_runs": 0, "refine_rounds": 0}
    recipe = parse_recipe(json.dumps(settings))
    pipeline.run_stages(recipe, run, last="score-blocks")
    return replace(children.found, scores=ArchitectureSearch.load(recipe, run).scores)


def certainty(run: RunFolder, metric: str, field: str) -> float:
    """Median over all variants of how many standard errors their score is from zero."""
    found = [read_json(path)[field] for path in sorted((run / f"scores/main/{metric}").glob("*.json"))]
    return statistics.median(abs(score["mean"]) / score["standard_error"] for score in found)


def measure(budget: Budget) -> Measured:
    """Accuracy and margin on the half of the items that nothing was chosen on; children assembled, not distilled."""
    if not TASK.is_file():
        raise SystemExit(f"{TASK} is missing. Make it with: python benchmarks/continuations.py")
    children = Children(budget)
    by_task = scored_by_task(children)
    items = half_of(read_task(TASK), False, TASK)
    tokenizer = load_tokenizer(parent_checkpoint(children.run))
    pairs = [encode_pair(tokenizer, item.question, f" {choice}") for item in items for choice in item.choices]
    task = TokenisedTask.of(items, tokenizer, None)

    def result(architecture=None) -> TaskResult:
        kept = Path(f"runs/benchmark-paper/{budget.name}-task-results")
        key = kept / f"{fingerprint(architecture.to_list()) if architecture else 'parent'}.json"
        if not key.exists():
            model = assemble(children.run, children.parent, architecture) if architecture else children.parent
            found = log_likelihoods(model, pairs, None)
            write_json(key, [value for value, _ in found])
        return task.measured(torch.tensor(read_json(key)))

    parent = result()
    columns: dict[str, dict[str, float]] = {}
    claims, differences = {}, []
    for speedup in SPEEDUPS:
        rows = {"KL": result(children.chosen(speedup)), "the task": result(children.chosen(speedup, by_task))}
        for what in ("accuracy", "margin"):
            scale, unit = (100, "%") if what == "accuracy" else (1, "nats")
            values = {"parent": parent, **rows}
            columns[f"{speedup}x {what}, {unit}"] = {
                row: scale * getattr(value, what).mean().item() for row, value in values.items()
            }
            paired = scale * (getattr(rows["the task"], what) - getattr(rows["KL"], what))
            mean, error = paired.mean().item(), paired.std().item() / len(paired) ** 0.5
            claims[f"{speedup}x {what}: the task better than KL"] = mean > 0
            differences.append(f"{speedup}x {what} {mean:+.2f} +- {error:.2f} {unit}")
    chance = 100 * sum(1 / len(item.choices) for item in items) / len(items)
    remark = (
        f"{len(items)} items that nothing was chosen on; chance {chance:.1f} %. Scores from {SCORING_ITEMS} others, by "
        f"margin (log-likelihood of the right choice less the likeliest wrong one). Paired differences with standard "
        f"errors: {'; '.join(differences)}."
    )
    gains = 100 * sum(score < 0 for score in by_task.scores.values()) / len(by_task.scores)
    task_run = RunFolder(Path(f"runs/benchmark-paper/{budget.name}-task"))
    by_items, by_kl = certainty(task_run, "task", "task_loss"), certainty(children.run, "kl", "kl_nats")
    remark += (
        f" So few items say little: the median variant's score is {by_items:.1f} of its standard errors from zero, "
        f"by KL {by_kl:.1f}; {gains:.0f} % score as gains."
    )
    return Measured(columns, claims, remark)


OURS = "accuracy and margin on continuations"
TABLE = Table("table_09", "Table 9: scores on the target task", "half of MMLU", PAPER, OURS, measure)

if __name__ == "__main__":
    TABLE.main()
