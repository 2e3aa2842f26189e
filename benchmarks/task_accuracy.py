"""Multiple-choice accuracy on the task files in ../shared/data/benchmarks (`question`, `choices`, `answer`).

The choice counts as given whose tokens the model finds likeliest per character after the question.
Nothing is measured where the files are not there. python benchmarks/task_accuracy.py [ITEMS] shows the
parent's accuracy beside chance.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

import torch

TASKS = Path("../shared/data/benchmarks")
ITEMS = 400
"""First items of each task."""
USED = ("social_iqa",)
"""On 400 items the parent is not clearly above chance there, and at it on the others."""


def items_of(task: str, limit: int = ITEMS) -> list[dict]:
    """The first items of a task; none where the files are not there."""
    path = TASKS / f"{task}.jsonl.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for _, line in zip(range(limit), file, strict=False)]


@torch.inference_mode()
def accuracy(model, tokenizer, items: list[dict]) -> float:
    """Share of items whose likeliest choice is the answer."""
    right = 0
    for item in items:
        question = tokenizer(item["question"])["input_ids"]
        choices = [tokenizer(" " + choice, add_special_tokens=False)["input_ids"] for choice in item["choices"]]
        longest = max(map(len, choices))
        batch = torch.tensor([question + c + [0] * (longest - len(c)) for c in choices])
        hidden = model.model(batch.to(model.device), use_cache=False).last_hidden_state[:, len(question) - 1 : -1]
        log_p = model.lm_head(hidden).float().log_softmax(-1)
        scores = [
            sum(log_p[row, at, token].item() for at, token in enumerate(c)) / len(text)
            for row, (c, text) in enumerate(zip(choices, item["choices"], strict=True))
        ]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


def accuracies(model, tokenizer) -> dict[str, float]:
    """Accuracy by task; empty where the files are not there."""
    return {task: accuracy(model, tokenizer, items) for task in USED if (items := items_of(task))}


def main() -> None:
    """The parent's accuracy and chance, for every task."""
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.families import load_parent, load_tokenizer
    from puzzle_nas.families.loading import parent_checkpoint

    run = RunFolder("runs/quickstart")
    parent, _ = load_parent(run)
    tokenizer = load_tokenizer(parent_checkpoint(run))
    for path in sorted(TASKS.glob("*.jsonl.gz")):
        task = path.name.removesuffix(".jsonl.gz")
        items = items_of(task, int(sys.argv[1]) if len(sys.argv) > 1 else ITEMS)
        chance = sum(1 / len(item["choices"]) for item in items) / len(items)
        error = math.sqrt(chance * (1 - chance) / len(items))
        print(f"{task:16s} {accuracy(parent, tokenizer, items):.3f}  chance {chance:.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
