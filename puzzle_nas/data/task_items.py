"""Multiple-choice items from JSON lines with `question`, `choices` and `answer` (index or text), and their halves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle_nas.data.sources import json_lines
from puzzle_nas.errors import DataError

EXAMPLE = '{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


@dataclass(frozen=True)
class TaskItem:
    """One question."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""

    @property
    def key(self) -> bytes:
        """A hash of the content: decides the half, and the order in which a limited number is taken."""
        return hashlib.blake2b(repr((self.question, self.choices)).encode("utf-8", "replace"), digest_size=8).digest()

    @property
    def for_scoring(self) -> bool:
        """Whether it is in the half that children may be chosen by; results are reported on the other half."""
        return self.key[0] % 2 == 0


def is_task_file(name: str) -> bool:
    """Whether a task's name is a file's."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def read_task(path: Path) -> list[TaskItem]:
    """All items of a file, each once, in the order of their keys.

    Raises:
        DataError: missing, damaged, or a line is no item.
    """
    if not path.is_file():
        raise DataError(f"There is no task file {path}.")
    items = {item.key: item for item in (_item(row, where) for where, row in json_lines(path, EXAMPLE))}
    if not items:
        raise DataError(f"The task {path} holds no items; write lines such as {EXAMPLE}.")
    return [items[key] for key in sorted(items)]


def half_of(items: Sequence[TaskItem], for_scoring: bool, path: Path) -> list[TaskItem]:
    """The half for scoring, or the other one, for reports.

    Raises:
        DataError: it is empty.
    """
    half = [item for item in items if item.for_scoring == for_scoring]
    if not half:
        raise DataError(f"The task {path} has too few items ({len(items)}) to be halved; give more.")
    return half


def _item(row: dict, where: str) -> TaskItem:
    question, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    choices = choices if isinstance(choices, list) and all(isinstance(c, str) and c for c in choices) else []
    if not isinstance(question, str) or not question.strip() or len(choices) < 2:
        raise DataError(f"{where} is not an item: it needs a question and two or more choices, such as {EXAMPLE}.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where} has the answer {answer!r:.60}, which is neither one of the choices nor its index.")
    # A space goes between question and choice.
    return TaskItem(question.rstrip(), tuple(choices), answer)
