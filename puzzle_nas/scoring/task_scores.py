"""Replace-1-block scores by a task instead of KL (Puzzle, Table 9).

Shapes: I items, N continuations (one for each choice of each item), T tokens, B batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from puzzle_nas.data.task_items import TaskItem
from puzzle_nas.estimates import estimate
from puzzle_nas.scoring.likelihood import encode_pair, of_labels, padded
from puzzle_nas.scoring.replacement import ReplacementWalk


@dataclass(frozen=True)
class TokenisedTask:
    """Every choice of every item after its question."""

    tokens_NT: torch.Tensor
    """Padded on the right."""
    labels_NT: torch.Tensor
    """-100 wherever no choice is predicted."""
    answers: tuple[tuple[int, int], ...]
    """Of each item, how many choices it has and which one is right."""

    @classmethod
    def of(cls, items: Sequence[TaskItem], tokenizer: Any, max_length: int | None) -> Self:
        """Prompts as lm-eval makes them: a space between question and choice."""
        pairs = [encode_pair(tokenizer, item.question, f" {choice}") for item in items for choice in item.choices]
        return cls(*padded(pairs, max_length), tuple((len(item.choices), item.answer) for item in items))

    def measured(self, log_likelihoods_N: torch.Tensor) -> TaskResult:
        """Margin and correctness of each item from the choices' log-likelihoods."""
        margins, correct = [], []
        parts = log_likelihoods_N.double().split([choices for choices, _ in self.answers])
        for values, (_, right) in zip(parts, self.answers, strict=True):
            wrong = torch.cat([values[:right], values[right + 1 :]])
            margins.append(values[right] - wrong.max())
            # Of equals the first counts, as in lm-eval.
            correct.append(float(values.argmax() == right))
        return TaskResult(torch.stack(margins), torch.tensor(correct, dtype=torch.float64))

    def doubt(self, parent: TaskResult) -> str:
        """Says so where the parent is not above chance (one-sided 95 %): no block can then lose what it knows."""
        level = torch.tensor([1 / choices for choices, _ in self.answers], dtype=torch.float64)
        error = (level * (1 - level)).sum().sqrt() / len(level)
        if parent.accuracy.mean() > level.mean() + 1.645 * error:
            return ""
        return (
            f"The parent answers {100 * parent.accuracy.mean():.1f} % of the task's {len(level)} items right, no "
            f"better than chance ({100 * level.mean():.1f} %): such scores do not tell good blocks from bad ones."
        )


@dataclass(frozen=True)
class TaskResult:
    """Of one model, [I] each, float64 on the CPU."""

    margin: torch.Tensor
    """Log-likelihood of the right choice less that of the most likely wrong one, nats."""
    accuracy: torch.Tensor
    """1 where the right choice is the most likely."""


class TaskWalk(ReplacementWalk):
    """`ReplacementWalk` whose results are a task's: `try_variants` gives a `TaskResult` for each replacement."""

    def __init__(
        self,
        parent: PreTrainedModel,
        task: TokenisedTask,
        batch_tokens: int,
        model: PreTrainedModel | None = None,
        scratch: Path | None = None,
        windows: Sequence[int] = (),
    ):
        self.task = task
        super().__init__(parent, task.tokens_NT, batch_tokens, model, scratch, windows)

    def rounded_otherwise(self) -> list:
        """Nothing: right and wrong choices are rounded alike."""
        return []

    def _compare(self, children: Iterable[list[torch.Tensor]]) -> list[TaskResult]:  # type: ignore[override]
        parts = [
            [of_labels(final_BTD, self.anatomy.head, labels_BT)[0].cpu() for final_BTD in batch]
            for labels_BT, batch in zip(self._batches(self.task.labels_NT), children, strict=True)
        ]
        return [self.task.measured(torch.cat(of_variant)) for of_variant in zip(*parts, strict=True)]


def task_score(result: TaskResult, parent: TaskResult, measure: str) -> dict[str, Any]:
    """The JSON of one variant. `task_loss` is what it loses of `measure` (margin, accuracy), a mean over items."""
    lost = getattr(parent, measure) - getattr(result, measure)
    return {
        "task_loss": estimate(lost.tolist()),
        "task_accuracy": result.accuracy.mean().item(),
        "task_loss_by_item": [round(value, 8) for value in lost.tolist()],
    }
