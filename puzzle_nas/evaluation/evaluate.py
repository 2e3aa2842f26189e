"""`puzzle evaluate`: what was asked of one model, against its parent where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.sources import is_local, local_files
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.errors import RecipeError
from puzzle_nas.evaluation.long_context import FIRST_LENGTH, evaluate_lengths
from puzzle_nas.evaluation.models import RUN_CHILD, Evaluated, Subject, comparable
from puzzle_nas.evaluation.served import engine_of, served_model
from puzzle_nas.evaluation.tasks import LoadedTasks, evaluate_tasks
from puzzle_nas.evaluation.text import compare_texts, domain_tokens, named_files, num_batches
from puzzle_nas.machine import describe
from puzzle_nas.progress import progress

VALIDATION = "validation"
LONG_SEQUENCES = 4
"""Sequences of the longest length, at least, where --data gives the text."""


@dataclass(frozen=True)
class Asked:
    """What to evaluate on."""

    data: tuple[str, ...] = ()
    """FILE or FILE=DOMAIN."""
    sequence_length: int = 512
    tokens: int = 16_384
    """Tokens of each domain."""
    tasks: tuple[str, ...] = ()
    """Files of items, or lm-eval's names."""
    limit: int | None = None
    """Items of each task."""
    held_out: bool = False
    """Of task files, only the half that scores of a task never see."""
    long_context: bool = False
    max_length: int | None = None
    """Longest length of `long_context`; None means all that the parent knows."""
    questions: int = 10
    """Of each kind at each length."""


def evaluate(model: Path, parent: Path | None, asked: Asked) -> dict[str, Any]:
    """Everything that was asked, as JSON; with nothing asked, a run's child on its validation split and, where scores
    were taken on a task, on that task's other half.

    Each part of a run's result, `text`, `tasks` and `long_context`, is kept in RUN/evaluations/PART.json as well.

    Raises:
        RecipeError: nothing to evaluate on, or lm-eval is missing.
        CheckpointError, DataError: a model or a file that cannot be read.
    """
    subject = Subject.of(model, parent)
    only_text = not asked.tasks and not asked.long_context
    if subject.run is None and not asked.data and only_text:
        raise RecipeError(f"{model} is not a run folder; name what to evaluate it on: --data, --tasks, --long-context.")
    scored = None if subject.recipe is None else subject.recipe.scoring.task
    names = asked.tasks or ((str(scored),) if scored is not None and only_text and not asked.data else ())
    seen = {item.key for item in half_of(read_task(scored), True, scored)} if scored is not None and names else set()
    # Whatever is missing comes out before anything is computed.
    tasks = LoadedTasks.of(names, asked.limit, asked.held_out, seen) if names else None
    files = named_files(asked.data)
    for name in filter(is_local, chain.from_iterable(files.values())):
        local_files(name)
    engine = engine_of(subject.checkpoint)
    if engine is None:
        return _evaluated(*subject.open(), subject, asked, files, tasks, only_text)
    above = subject.open_parent()
    if above is None or asked.long_context:
        why = "its tokenizer is the parent's: name it with --parent" if above is None else "leave out --long-context"
        raise RecipeError(f"{model} is an export; {why}.")
    with served_model(engine, subject.checkpoint, above) as child:
        return _evaluated(child, above, subject, asked, files, tasks, only_text)


def _evaluated(
    child: Evaluated,
    above: Evaluated | None,
    subject: Subject,
    asked: Asked,
    files: dict[str, list[str]],
    tasks: LoadedTasks | None,
    only_text: bool,
) -> dict[str, Any]:
    domains = _domains(child, above, subject, asked, files) if asked.data or only_text else None
    texts = domains is not None or asked.long_context
    if above is not None and texts:
        comparable(child, above)
    parts: dict[str, Any] = {}

    def keep(name: str, part: dict[str, Any]) -> None:
        parts[name] = part | {
            "model": str(subject.checkpoint),
            "parent": None if above is None else str(subject.parent),
            "machine": describe(subject.machine),
        }
        if subject.run is not None and subject.checkpoint.name == RUN_CHILD:
            # The report shows it until the child is made again.
            parts[name]["made_from"] = (subject.run.record("distill_child") or {}).get("outputs_fingerprint")
            write_json(evaluation_path(subject.run, name), parts[name])

    if domains is not None:
        with progress("compare on text, batch", sum(map(num_batches, domains.values()))) as ticker:
            found = compare_texts(child, above, domains, ticker.advance)
        keep("text", {"sequence_length": next(iter(domains.values())).shape[1], **found})
    if tasks is not None:
        keep("tasks", evaluate_tasks(child, above, tasks))
    if asked.long_context:
        keep("long_context", _long_context(child, above, subject, asked, files))
    return parts


def evaluation_path(run: RunFolder, part: str) -> Path:
    """Where a run keeps one part of its last evaluation."""
    return run / "evaluations" / f"{part}.json"


def _long_context(
    child: Evaluated, parent: Evaluated | None, subject: Subject, asked: Asked, files: dict[str, list[str]]
) -> dict[str, Any]:
    longest = asked.max_length or (parent or child).max_length
    if longest is None:
        raise RecipeError("The model does not say how many positions it knows; give --max-length.")
    text = None
    if asked.data:
        all_files = list(chain.from_iterable(files.values()))
        wanted = max(asked.tokens, LONG_SEQUENCES * longest)
        shortest = min(FIRST_LENGTH, longest)
        text = domain_tokens(all_files, (parent or child).tokenizer, shortest, wanted, subject.seed, largest=longest)
    elif subject.run is not None:
        text = load_tokens(subject.run, VALIDATION)
    return evaluate_lengths(child, parent, text, longest, asked.questions, subject.seed)


def _domains(
    child: Evaluated, parent: Evaluated | None, subject: Subject, asked: Asked, files: dict[str, list[str]]
) -> dict[str, torch.Tensor]:
    """Tokens [S, T] by domain; T is at most what both models have positions for."""
    if not asked.data:
        assert subject.run is not None
        return {VALIDATION: load_tokens(subject.run, VALIDATION)}
    models = [child] if parent is None else [child, parent]
    length = min([asked.sequence_length, *(model.max_length for model in models if model.max_length is not None)])
    if length < asked.sequence_length:
        print(f"Sequences have {length} tokens instead of {asked.sequence_length}: more positions there are not.")
    return {
        domain: domain_tokens(names, models[-1].tokenizer, length, asked.tokens, subject.seed)
        for domain, names in files.items()
    }
