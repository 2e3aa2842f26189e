"""Benchmarks through lm-eval, and how much of the parent's accuracy a child preserves (Puzzle, Table 2)."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from puzzle_nas.data.task_items import half_of, is_task_file, read_task
from puzzle_nas.errors import DataError, RecipeError
from puzzle_nas.estimates import above, estimate, preserved
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.progress import progress

PREFERRED_METRIC = "acc_norm"
"""What is usually quoted of tasks that have it."""


@dataclass(frozen=True)
class LoadedTasks:
    """lm-eval's task objects."""

    tasks: Mapping[str, Any]
    halved: Collection[str]
    """Names of those that are the half of a file by which children are never chosen."""
    limit: int | None
    """Items of each task; None means all."""

    @classmethod
    def of(
        cls, names: Sequence[str], limit: int | None = None, held_out: bool = False, seen: Collection[bytes] = ()
    ) -> Self:
        """From files of items (see `data.task_items`), or names of lm-eval's own tasks.

        Args:
            held_out: of files, only the half that children are never chosen by.
            seen: keys of items that this child was chosen by; a file that holds any is halved too.

        Raises:
            RecipeError: lm-eval is not installed.
            DataError: a task cannot be loaded.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise RecipeError("Tasks are run by lm-eval, which is not installed. Install it with: pip install lm-eval")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from puzzle_nas.evaluation.harness import choice_task

        found: dict[str, Any] = {}
        halved: set[str] = set()
        for name in names:
            loaded = None if is_task_file(name) else _of_harness(name)
            if loaded is None:
                items = read_task(Path(name))
                label = Path(name).name.split(".")[0]
                if held_out or any(item.key in seen for item in items):
                    items = half_of(items, False, Path(name))
                    halved.add(label)
                # Items come in the order of their hashes, which says nothing about them.
                rows = [{"question": i.question, "choices": list(i.choices), "answer": i.answer} for i in items[:limit]]
                loaded = {label: choice_task(label, rows)}
            if twice := loaded.keys() & found.keys():
                raise DataError(
                    f"Two tasks are called {', '.join(sorted(twice))}; rename a file, or name each task once."
                )
            found |= loaded
        return cls(found, halved, limit)


def evaluate_tasks(child: Evaluated, parent: Evaluated | None, loaded: LoadedTasks) -> dict[str, Any]:
    """Every task for both models, and the average of what is preserved, as JSON.

    Tasks on which the parent is not above chance (one-sided 95 %) say nothing about a child: `counted` is false, and
    the average leaves them out.

    Raises:
        DataError: a task has no score of single items.
    """
    by_model = [_scores(model, loaded) for model in (child, parent) if model is not None]
    rows = {name: _row(by_model[0][name], by_model[1][name] if parent else None) for name in by_model[0]}
    for name, row in rows.items():
        row["held_out_half"] = name in loaded.halved
    result: dict[str, Any] = {"limit": loaded.limit, "tasks": rows}
    if parent is not None:
        counted = {name: row for name, row in rows.items() if row["counted"]}
        pairs = [(row["by_item"], row["parent_by_item"]) for row in counted.values()]
        result["average_preserved"] = preserved(pairs) if pairs else None
        result["left_out"] = [name for name in rows if name not in counted]
    return result


def _of_harness(name: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager().load([name])["tasks"]
    # Any exception: the loader passes on those of the hub and of every data set's own code.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"'{name}' is not a .jsonl file, and as one of lm-eval's tasks it could not be loaded ({reason}); "
            "correct the name, go online, or give a file of items."
        ) from error


def _scores(model: Evaluated, loaded: LoadedTasks) -> dict[str, dict[str, Any]]:
    """By task: the metric, its value for every item, and what guessing would give there."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from puzzle_nas.evaluation.harness import HarnessModel

    tasks, limit = loaded.tasks, loaded.limit
    documents = {name: list(task.eval_docs)[:limit] for name, task in tasks.items()}
    total = sum(_num_requests(tasks[name], docs) for name, docs in documents.items())
    harness: Any = HarnessModel
    with progress("tasks, requests", total) as ticker:
        found: Any = simple_evaluate(
            harness(model, lambda rows: ticker.advance(min(rows, total - ticker.done))),
            tasks=list(tasks.values()),
            limit=limit,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
    results = {}
    for name, task in tasks.items():
        samples = found["samples"][name]
        samples = sorted((s for s in samples if s["filter"] == samples[0]["filter"]), key=lambda s: s["doc_id"])
        metric = _metric(samples[0], found["higher_is_better"][name], name)
        values = [float(sample[metric]) for sample in samples]
        results[name] = {"metric": metric, "values": values, "chance": chance(task, [s["doc"] for s in samples])}
    return results


def _num_requests(task: Any, docs: Sequence[Any]) -> int:
    choices = task.OUTPUT_TYPE == "multiple_choice"
    return sum(len(task.doc_to_choice(doc)) if choices else 1 for doc in docs)


def _metric(sample: Mapping[str, Any], higher_is_better: Mapping[str, bool], task: str) -> str:
    usable = [m for m, better in higher_is_better.items() if better and isinstance(sample.get(m), int | float)]
    if not usable:
        raise DataError(f"The task {task} has no score of single items of which more is better; leave it out.")
    return PREFERRED_METRIC if PREFERRED_METRIC in usable else usable[0]


def chance(task: Any, docs: Sequence[Any]) -> np.ndarray:
    """What guessing gives, by item: 1 / choices; where all items have the same choices, at least the commonest one's
    share; 0 where the answer is free."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return np.zeros(len(docs))
    choices = [tuple(task.doc_to_choice(doc)) for doc in docs]
    level = np.array([1 / len(c) for c in choices])
    targets = [task.doc_to_target(doc) for doc in docs]
    if len({frozenset(c) for c in choices}) == 1 and all(isinstance(target, int) for target in targets):
        answers = Counter(c[target] for c, target in zip(choices, targets, strict=True))
        level = np.maximum(level, answers.most_common(1)[0][1] / len(docs))
    return level


def _row(child: Mapping[str, Any], parent: Mapping[str, Any] | None) -> dict[str, Any]:
    values, level = np.array(child["values"]), child["chance"]
    row: dict[str, Any] = {"metric": child["metric"], "items": len(values), "chance": float(level.mean())}
    row |= {"score": estimate(values), "by_item": child["values"]}
    if parent is not None:
        theirs = np.array(parent["values"])
        counted = above(theirs, level)
        row |= {
            "parent_score": estimate(theirs),
            "parent_by_item": parent["values"],
            "difference": estimate(values - theirs),
            "counted": counted,
            "preserved": preserved([(values, theirs)]) if theirs.mean() > 0 else None,
        }
    return row
