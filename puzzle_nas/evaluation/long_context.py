"""What a child keeps of its parent at growing lengths (Puzzle, Tables 4 and 14): loss, KL, and questions.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from puzzle_nas.errors import DataError
from puzzle_nas.estimates import above, estimate, preserved
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.evaluation.ruler import KINDS, Question, question
from puzzle_nas.evaluation.text import compare_texts, num_batches
from puzzle_nas.parents.tokenizer import prompt_ids
from puzzle_nas.progress import progress

FIRST_LENGTH = 512


def lengths_to(longest: int) -> list[int]:
    """512, 1024, ... and `longest` itself."""
    lengths = []
    length = FIRST_LENGTH
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]


def evaluate_lengths(
    child: Evaluated,
    parent: Evaluated | None,
    text_ST: torch.Tensor | None,
    longest: int,
    questions: int,
    seed: int,
) -> dict[str, Any]:
    """By length: figures on text, and scores of each kind of question, as JSON.

    Text counts from the middle of each sequence on: every position there has at least half the length before it.
    A model's answer is its greedy continuation of the plain prompt; a score is the share of the answers in it.

    Args:
        text_ST: text that runs on from row to row; None where there is none to compare on.
        longest: longest length in tokens.
        questions: of each kind at each length.

    Raises:
        DataError: a length beyond what the parent knows, or too short for any question.
    """
    known = (parent or child).max_length
    if known is not None and longest > known:
        raise DataError(f"--max-length is {longest}, but the parent has {known} positions; lower it.")
    tokenizer = (parent or child).tokenizer
    lengths = lengths_to(longest)
    asked = {
        (length, kind): [question(kind, number, length, tokenizer, seed) for number in range(questions)]
        for length in lengths
        for kind in KINDS
    }
    texts = {length: _cut(text_ST, length) for length in lengths}
    models = [model for model in (child, parent) if model is not None]
    batches = sum(num_batches(text) for text in texts.values() if text is not None)
    rows: dict[str, Any] = {}
    with progress("long context, answer or batch of text", batches + len(models) * questions * len(asked)) as ticker:
        for length, text in texts.items():
            scores = {
                kind: [[_answer_score(model, q, ticker.advance) for q in asked[length, kind]] for model in models]
                for kind in KINDS
            }
            rows[str(length)] = _scores(scores) if questions else {}
            if text is not None:
                found = compare_texts(child, parent, {"text": text}, ticker.advance, from_position=length // 2)
                rows[str(length)]["text"] = found["all"]
    return {"questions": questions, "lengths": rows}


def _cut(text_ST: torch.Tensor | None, length: int) -> torch.Tensor | None:
    if text_ST is None or text_ST.numel() < length:
        return None
    return text_ST.flatten()[: text_ST.numel() // length * length].view(-1, length)


@torch.inference_mode()
def _answer_score(model: Evaluated, asked: Question, on_answer: Callable[[], None]) -> float:
    inputs = torch.tensor([prompt_ids(model.tokenizer, asked.prompt)], device=model.device)
    end = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else model.tokenizer.eos_token_id
    settings = {"max_new_tokens": asked.answer_tokens, "do_sample": False, "pad_token_id": end}
    written = model.whole.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    on_answer()
    return asked.score(model.tokenizer.decode(written[0, inputs.shape[1] :], skip_special_tokens=True))


def _scores(scores: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """JSON of one length from the scores of child and parent by kind."""
    rows = {kind: _row(*values) for kind, values in scores.items()}
    together = [np.concatenate(values) for values in zip(*scores.values(), strict=True)]
    return {"tasks": rows, "average": _row(*together)}


def _row(child: Any, parent: Any = None) -> dict[str, Any]:
    row: dict[str, Any] = {"score": estimate(child)}
    if parent is not None:
        answers = above(parent, np.zeros(len(parent)))
        row |= {
            "parent_score": estimate(parent),
            "difference": estimate(np.subtract(child, parent)),
            "preserved": preserved([(child, parent)]) if answers else None,
        }
    return row
