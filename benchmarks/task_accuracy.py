"""Multiple-choice accuracy on files of items: those of ../shared/data/benchmarks, and that of continuations.py.

The choice counts as given that the model finds likeliest after the question, lm-eval's `acc`. Nothing is measured where
a file is not there. python benchmarks/task_accuracy.py [ITEMS] shows the parent's accuracy beside chance.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch

from puzzle_nas.data.task_items import TaskItem, read_task
from puzzle_nas.scoring.likelihood import encode_pair, log_likelihoods
from puzzle_nas.scoring.task_scores import TokenisedTask

CONTINUATIONS = Path("runs/benchmark-tasks/continuations.jsonl")
"""Written by continuations.py."""
UNREAD_CONTINUATIONS = CONTINUATIONS.with_name("continuations_unread.jsonl")
"""Those of which nothing stands in ../shared/data/train, for children that have read all of it."""
FILES = {
    **{path.name.split(".")[0]: path for path in sorted(Path("../shared/data/benchmarks").glob("*.jsonl.gz"))},
    "continuations": CONTINUATIONS,
    "continuations_unread": UNREAD_CONTINUATIONS,
}
USED = {"continuations": 800}
"""Items of the tasks that children are compared on. On the others the parent is at chance (evaluation.py)."""


def items_of(task: str, limit: int) -> list[TaskItem]:
    """So many items of a task, in the order of their hashes; none where the file is not there."""
    return read_task(FILES[task])[:limit] if task in FILES and FILES[task].exists() else []


def right_answers(model, tokenizer, items: list[TaskItem]) -> list[float]:
    """1 for each item whose likeliest choice is the answer, else 0."""
    pairs = [encode_pair(tokenizer, item.question, f" {choice}") for item in items for choice in item.choices]
    found = torch.tensor([value for value, _ in log_likelihoods(model, pairs, None)])
    return TokenisedTask.of(items, tokenizer, None).measured(found).accuracy.tolist()


def main() -> None:
    """The parent's accuracy and chance, for every task."""
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.families import load_parent, load_tokenizer
    from puzzle_nas.families.loading import parent_checkpoint
    from puzzle_nas.pipeline import open_run

    run = RunFolder("runs/torch")
    parent = load_parent(open_run(run), run)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(parent_checkpoint(run))
    for task in FILES:
        if items := items_of(task, int(sys.argv[1]) if len(sys.argv) > 1 else 400):
            chance = sum(1 / len(item.choices) for item in items) / len(items)
            error = math.sqrt(chance * (1 - chance) / len(items))
            right = sum(right_answers(parent, tokenizer, items)) / len(items)
            print(f"{task:16s} {right:.3f}  chance {chance:.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
