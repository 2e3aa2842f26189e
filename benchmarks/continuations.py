"""A multiple-choice task that a small parent can do: which words go on this passage?

In the manner of HellaSwag, but ours, and easier: the wrong endings are not written to deceive. They are the endings of
other passages of the same document, or of the same kind of text where a document is short, so that an ending is about
as often wrong as right and says nothing by itself. Nothing is picked by hand: the documents of
../shared/data/validation are cut into passages, and of each kind of text equally many are drawn.

How long passages are was decided by the parent's accuracy alone: no child has been looked at. Left out: kinds of text
that are Python's library and manual; passages with SHARED_WORDS words in a row that RUN has read; items with two equal
choices, or with a choice that stands in the question.

Writes runs/benchmark-tasks/continuations.jsonl, for `puzzle evaluate --tasks` and `scoring.task`, counts the passages
that RUN has read, and measures its parent's accuracy (about five minutes on one core). With --unread it writes
continuations_unread.jsonl: the items that share no SHARED_WORDS words in a row with ../shared/data/train.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import (
    CONTINUATIONS,
    LIBRARY_KINDS,
    UNREAD_CONTINUATIONS,
    RunArgument,
    opened,
    report,
    right_answers,
    shared,
    task_items,
)
from puzzle_nas.artifacts import RunFolder, write_bytes
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.task_items import TaskItem
from puzzle_nas.families import load_tokenizer, parent_checkpoint

SPLITS = ("train", "calibration", "scoring", "selection")
QUESTION_WORDS, ENDING_WORDS = 24, 6
ITEMS_OF_A_KIND = 140
CHOICES = 4
SHARED_WORDS = 8

Passage = tuple[str, str]
"""Question and ending."""
Documents = Sequence[list[str]]
"""Of one kind of text, the words of each."""


def passages(words: list[str]) -> list[Passage]:
    """A document cut from its beginning, with one space between words."""
    length = QUESTION_WORDS + ENDING_WORDS
    parts = (words[start : start + length] for start in range(0, len(words) - length + 1, length))
    return [(" ".join(part[:QUESTION_WORDS]), " ".join(part[QUESTION_WORDS:])) for part in parts]


def word_rows(text: str) -> Iterator[tuple[str, ...]]:
    """Each SHARED_WORDS words in a row, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1))


def item_of(passage: Passage, endings: Sequence[str], rng: random.Random) -> TaskItem | None:
    """The passage as a question with its own ending and others of `endings`; none if that is ambiguous."""
    question, answer = passage
    choices = [answer, *rng.sample([ending for ending in endings if ending != answer], CHOICES - 1)]
    plain = {choice.lower() for choice in choices}
    if len(plain) < CHOICES or any(choice in question.lower() for choice in plain):
        return None
    rng.shuffle(choices)
    return TaskItem(question, tuple(choices), choices.index(answer))


def items_of_kind(documents: Documents, read: set) -> list[TaskItem]:
    """Items of one kind of text, drawn at random."""
    rng = random.Random(0)
    cut = [passages(words) for words in documents]
    every = [ending for document in cut for _, ending in document]
    found = []
    for document in cut:
        own = [ending for _, ending in document]
        for passage in document:
            item = item_of(passage, own if len(set(own)) >= CHOICES else every, rng)
            if item is not None and read.isdisjoint(word_rows(" ".join(passage))):
                found.append(item)
    return rng.sample(found, ITEMS_OF_A_KIND)


def documents_of(part: str) -> dict[str, list[str]]:
    """Texts by kind."""
    kinds: dict[str, list[str]] = {}
    for path in shared(part):
        with gzip.open(path, "rt") as file:
            kinds[path.name.split(".")[0]] = [json.loads(line)["text"] for line in file]
    return kinds


def write_items(path: Path, items: Sequence[TaskItem]) -> None:
    """As JSON lines."""
    lines = [json.dumps(vars(item), ensure_ascii=False) + "\n" for item in items]
    write_bytes(path, "".join(lines).encode())
    print(f"{len(items)} items written to {path}")


def keep_unread() -> None:
    """Leave out items that share words with the text for training."""
    items = task_items(CONTINUATIONS)
    rows = [{row for c in item.choices for row in word_rows(f"{item.question} {c}")} for item in items]
    asked = set().union(*rows)
    texts = (text for documents in documents_of("train").values() for text in documents)
    read = {row for text in texts for row in word_rows(text) if row in asked}
    write_items(
        UNREAD_CONTINUATIONS,
        [item for item, of_item in zip(items, rows, strict=True) if read.isdisjoint(of_item)],
    )


def main(run: RunArgument = Path("runs/torch"), unread: bool = False) -> None:
    """See above."""
    if unread:
        keep_unread()
        return
    kinds: dict[str, Documents] = {k: [t.split() for t in texts] for k, texts in documents_of("validation").items()}
    folder = RunFolder(run)
    parent, tokenizer = opened(folder)[1], load_tokenizer(parent_checkpoint(folder))
    read = set().union(*(word_rows(tokenizer.decode(row)) for split in SPLITS for row in load_tokens(folder, split)))
    used = {kind: documents for kind, documents in kinds.items() if kind not in LIBRARY_KINDS}
    items = {kind: items_of_kind(documents, read) for kind, documents in used.items()}
    write_items(CONTINUATIONS, [item for of_kind in items.values() for item in of_kind])

    figures: dict[str, float] = {}
    for kind, documents in kinds.items():
        cut = [" ".join(passage) for words in documents for passage in passages(words)]
        figures[f"passages_{kind}"] = len(cut)
        figures[f"passages_read_by_run_{kind}"] = sum(not read.isdisjoint(word_rows(passage)) for passage in cut)
    by_kind = {kind: right_answers(parent, tokenizer, of_kind) for kind, of_kind in items.items()}
    right = [value for of_kind in by_kind.values() for value in of_kind]
    figures |= {"items": len(right), "chance": 1 / CHOICES, "accuracy_parent": sum(right) / len(right)}
    figures |= {f"accuracy_parent_{kind}": sum(of_kind) / len(of_kind) for kind, of_kind in by_kind.items()}
    report("continuations", figures)
