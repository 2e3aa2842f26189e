"""A multiple-choice task that a small parent can do: which words go on this passage?

In the manner of HellaSwag, but ours, and easier: the wrong endings are not written to deceive. They are the endings of
other passages of the same document, or of the same kind of text where a document is short, so that an ending is about
as often wrong as right and says nothing by itself. Nothing is picked by hand: the documents of
../shared/data/validation are cut into passages, and of each kind of text equally many are drawn.

How long passages are was decided by the parent's accuracy alone, on TRIED_ITEMS_OF_A_KIND: no child has been looked at.
It is well above chance and well below 100 % with each of TRIED, and the shortest takes half the time of the longest.

Left out: kinds of text that are Python's library and manual, of which the quickstart's run has read parts; passages
with SHARED_WORDS words in a row that it has read; items with two equal choices, or with a choice that stands in the
question.

python benchmarks/continuations.py: writes runs/benchmark-tasks/continuations.jsonl, a file for `puzzle evaluate
--tasks` and `scoring.task`; then counts, by kind of text, the passages that the run has read, and measures the parent's
accuracy. About five minutes on one core
python benchmarks/continuations.py --unread: writes runs/benchmark-tasks/continuations_unread.jsonl, the items of which
no passage has SHARED_WORDS words in a row with ../shared/data/train
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from general_text import LIBRARY_KINDS, TEXT
from results import save
from task_accuracy import CONTINUATIONS, UNREAD_CONTINUATIONS, right_answers

from puzzle_nas.artifacts import RunFolder, write_bytes
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.data.task_items import TaskItem, read_task
from puzzle_nas.families import load_parent, load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.pipeline import open_run

RUN = RunFolder("runs/torch")
SPLITS = ("train", "calibration", "scoring", "selection")
TRIED = ((24, 6), (32, 8), (48, 10))
"""Words of question and ending; the first are used."""
TRIED_ITEMS_OF_A_KIND = 15
ITEMS_OF_A_KIND = 140
CHOICES = 4
SHARED_WORDS = 8

Passage = tuple[str, str]
"""Question and ending."""
Documents = Sequence[list[str]]
"""Of one kind of text, the words of each."""


def passages(words: list[str], lengths: tuple[int, int]) -> list[Passage]:
    """A document cut from its beginning, with one space between words."""
    length = sum(lengths)
    parts = (words[start : start + length] for start in range(0, len(words) - length + 1, length))
    return [(" ".join(part[: lengths[0]]), " ".join(part[lengths[0] :])) for part in parts]


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


def items_of_kind(documents: Documents, lengths: tuple[int, int], number: int, read: set) -> list[TaskItem]:
    """So many items of one kind of text, drawn at random."""
    rng = random.Random(0)
    cut = [passages(words, lengths) for words in documents]
    every = [ending for document in cut for _, ending in document]
    found = []
    for document in cut:
        own = [ending for _, ending in document]
        for passage in document:
            item = item_of(passage, own if len(set(own)) >= CHOICES else every, rng)
            if item is not None and read.isdisjoint(word_rows(" ".join(passage))):
                found.append(item)
    return rng.sample(found, number)


def documents_of(folder: Path) -> dict[str, list[str]]:
    """By kind of text."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as file:
            kinds[path.name.split(".")[0]] = [json.loads(line)["text"] for line in file]
    return kinds


def write_items(path: Path, items: Sequence[TaskItem]) -> None:
    """As JSON lines."""
    lines = [json.dumps(vars(item), ensure_ascii=False) + "\n" for item in items]
    write_bytes(path, "".join(lines).encode())


def keep_unread() -> None:
    """Leave out items that share words with the text for training."""
    items = read_task(CONTINUATIONS)
    rows = [{row for c in item.choices for row in word_rows(f"{item.question} {c}")} for item in items]
    asked = set().union(*rows)
    texts = (text for documents in documents_of(TEXT.with_name("train")).values() for text in documents)
    read = {row for text in texts for row in word_rows(text) if row in asked}
    unread = [item for item, of_item in zip(items, rows, strict=True) if read.isdisjoint(of_item)]
    write_items(UNREAD_CONTINUATIONS, unread)
    print(f"{len(unread)} of {len(items)} items written to {UNREAD_CONTINUATIONS}")


def main() -> None:
    """See above."""
    if not TEXT.is_dir():
        raise SystemExit(f"{TEXT} is not here: nothing to make items of.")
    if sys.argv[1:] == ["--unread"]:
        keep_unread()
        return
    parent = load_parent(open_run(RUN), RUN)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(parent_checkpoint(RUN))
    read = set().union(*(word_rows(tokenizer.decode(row)) for split in SPLITS for row in load_tokens(RUN, split)))
    kinds: dict[str, Documents] = {kind: [t.split() for t in texts] for kind, texts in documents_of(TEXT).items()}
    used = {kind: documents for kind, documents in kinds.items() if kind not in LIBRARY_KINDS}
    items = {kind: items_of_kind(documents, TRIED[0], ITEMS_OF_A_KIND, read) for kind, documents in used.items()}
    write_items(CONTINUATIONS, [item for of_kind in items.values() for item in of_kind])

    figures: dict[str, float] = {}
    for kind, documents in kinds.items():
        cut = [" ".join(passage) for words in documents for passage in passages(words, TRIED[0])]
        figures |= {
            f"passages_{kind}": len(cut),
            f"passages_read_by_run_{kind}": sum(not read.isdisjoint(word_rows(passage)) for passage in cut),
        }
    for lengths in TRIED:
        few = [i for documents in used.values() for i in items_of_kind(documents, lengths, TRIED_ITEMS_OF_A_KIND, read)]
        right = right_answers(parent, tokenizer, few)
        figures["accuracy_parent_tried_{}+{}_words".format(*lengths)] = sum(right) / len(right)
    by_kind = {kind: right_answers(parent, tokenizer, of_kind) for kind, of_kind in items.items()}
    right = [value for of_kind in by_kind.values() for value in of_kind]
    figures |= {"items": len(right), "chance": 1 / CHOICES, "accuracy_parent": sum(right) / len(right)}
    figures |= {f"accuracy_parent_{kind}": sum(of_kind) / len(of_kind) for kind, of_kind in by_kind.items()}
    for key, value in figures.items():
        print(f"{key:45s} {value:.4g}")
    print("Written to", CONTINUATIONS, "and", save("continuations", figures))


if __name__ == "__main__":
    main()
