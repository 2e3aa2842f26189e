"""Blind pairwise ballots of a child's answers against its parent's, each pair in both orders (Puzzle, Figure 4)."""

from __future__ import annotations

import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from puzzle_nas.artifacts import file_checksum, fingerprint, read_json, write_json
from puzzle_nas.data.sources import json_lines
from puzzle_nas.errors import DataError, EngineError, RecipeError
from puzzle_nas.estimates import wilson_interval
from puzzle_nas.evaluation.models import Subject, open_model
from puzzle_nas.families.generation import answer
from puzzle_nas.progress import progress
from puzzle_nas.text_files import read_text

TIMEOUT_SECONDS = 600
TRIES = 3
VERDICT_TOKENS = 512
"""Longest reply of a judge; some think aloud first."""
UNCLEAR, NO_VERDICT = "unclear", "no verdict"
"""A reply that could not be read, and none: empty, or nothing but thoughts."""
VOTES = {"A": "first", "B": "second", "C": "tie"}
PROMPT = """Below are a question and two answers to it. Say which answer is better: correct, helpful and to the point. \
Neither the order nor the length of the answers matters by itself.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

End your reply with your verdict: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if both are equal."""


class Judge(ABC):
    """Who votes."""

    name: str
    automatic: ClassVar[bool] = True
    """Whether nobody waits at the terminal, so that progress may be shown there."""

    @abstractmethod
    def vote(self, question: str, first: str, second: str) -> str:
        """`first`, `second`, `tie`, `unclear` or `no verdict`."""


@dataclass(frozen=True)
class Endpoint(Judge):
    """A model behind an OpenAI-compatible endpoint."""

    url: str
    """Up to and with /v1."""
    model: str
    settings: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": VERDICT_TOKENS})
    """What requests say besides; changed to what the server accepts."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """Which model, and where."""
        return f"{self.model} at {self.url}"

    def vote(self, question: str, first: str, second: str) -> str:
        """See `Judge.vote`.

        Raises:
            EngineError: the endpoint does not answer, or answers with an error.
        """
        content = PROMPT.format(question=question, first=first, second=second)
        reply = self._post({"model": self.model, "messages": [{"role": "user", "content": content}]})
        try:
            return read_vote(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"The judge at {self.url} does not answer as OpenAI's chat completions do.") from None

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            local = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
            request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", headers=headers)
        except ValueError:
            raise RecipeError(f"'{self.url}' is not a URL; write one such as http://127.0.0.1:8000/v1.") from None
        # A proxy of the environment has no say on loopback.
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        left = TRIES
        while left:
            left -= 1
            request.data = json.dumps({**body, **self.settings}).encode()
            try:
                with opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                if left and (error.code == 429 or error.code >= 500):
                    time.sleep(2 ** (TRIES - left))
                    continue
                said = error.read(1000).decode(errors="replace")
                if error.code in (400, 422) and self._adapt(said):
                    left += 1
                    continue
                raise EngineError(f"The judge at {self.url} answered with error {error.code}: {said[:300]}") from None
            except (OSError, ValueError) as error:
                if not left:
                    raise EngineError(f"The judge at {self.url} does not answer: {error}.") from None
                time.sleep(2 ** (TRIES - left))
        raise AssertionError("unreachable")

    def _adapt(self, complaint: str) -> bool:
        """Ask as the server wants it: whether there is something in its complaint that had not been tried."""
        if "max_completion_tokens" in complaint and "max_tokens" in self.settings:
            self.settings["max_completion_tokens"] = self.settings.pop("max_tokens")
            return True
        refused = next((name for name in self.settings if name in complaint), None)
        return self.settings.pop(refused, None) is not None if refused else False


class Person(Judge):
    """Whoever sits at the terminal."""

    name = "a person"
    automatic = False

    def vote(self, question: str, first: str, second: str) -> str:
        """See `Judge.vote`. The end of input stops, as Ctrl-C does."""
        print(f"\n=== Question\n{question}\n\n--- A\n{first}\n\n--- B\n{second}\n")
        while True:
            try:
                said = input("Which is better: a, b, or t for a tie? ").strip().lower()
            except EOFError:
                raise KeyboardInterrupt from None
            if said in ("a", "b", "t"):
                return {"a": "first", "b": "second", "t": "tie"}[said]


def read_vote(reply: str) -> str:
    """The last [[A]], [[B]] or [[C]] of a judge's reply, or the reply if it is one of these letters alone."""
    reply = re.sub(r"<think>.*?(</think>|$)", "", reply, flags=re.DOTALL)
    if not reply.strip():
        return NO_VERDICT
    marked = re.findall(r"\[\[([ABC])\]\]", reply)
    if not marked:
        alone = re.fullmatch(r"\W*([ABC])\W*", reply)
        return VOTES[alone.group(1)] if alone else UNCLEAR
    return VOTES[marked[-1]]


def read_questions(path: Path) -> list[str]:
    """Questions from JSON lines with `question`, or from the lines of a text file.

    Raises:
        DataError: missing, or it holds none.
    """
    if not path.is_file():
        raise DataError(f"There is no file of questions {path}.")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = [row for _, row in json_lines(path, '{"question": "..."}')]
        found = [row["question"] for row in rows if isinstance(row.get("question"), str)]
    else:
        found = [line.strip() for line in read_text(path).splitlines()]
    found = list(dict.fromkeys(question for question in found if question.strip()))
    if not found:
        raise DataError(f"{path} holds no questions; write one in each line, or JSON lines with question.")
    return found


def judge_child(
    model: Path, parent: Path | None, questions: Path, judge: Judge, max_new_tokens: int, out: Path | None
) -> dict[str, Any]:
    """Answers of both, then votes, as JSON. What is done is kept in `out` after each answer and vote.

    Raises:
        RecipeError: no parent.
        CheckpointError, DataError, EngineError: a model, the questions, or the judge.
    """
    subject = Subject.of(model, parent)
    if subject.parent is None:
        raise RecipeError(f"{model} is not a run folder; say what its answers are compared with: --parent CHECKPOINT.")
    if out is None and subject.run is not None:
        out = subject.run / "evaluations" / "judged.json"
    checkpoints = {"child": subject.checkpoint, "parent": subject.parent}
    asked = read_questions(questions)
    weights = {
        name: {file.name: file_checksum(file) for file in sorted(path.glob("*.safetensors"))}
        for name, path in checkpoints.items()
    }
    made_from = fingerprint([weights, asked, max_new_tokens, judge.name])
    state: dict[str, Any] = read_json(out) if out is not None and out.exists() else {}
    if state.get("made_from") != made_from:
        pairs = [{"question": question, "answers": {}, "votes": {}} for question in asked]
        state = {"made_from": made_from, "judge": judge.name, "pairs": pairs}
    state |= {name: str(path) for name, path in checkpoints.items()}

    def keep() -> None:
        if out is not None:
            write_json(out, state)

    for name, path in checkpoints.items():
        _answer(state["pairs"], name, path, subject, max_new_tokens, keep)
    _vote(state["pairs"], judge, subject.seed, keep)
    state |= outcome([pair["votes"] for pair in state["pairs"]])
    keep()
    return state


def _answer(pairs: Sequence[Any], name: str, checkpoint: Path, subject: Subject, max_new_tokens: int, keep) -> None:
    missing = [pair for pair in pairs if name not in pair["answers"]]
    if not missing:
        return
    model = open_model(checkpoint, subject.machine)
    with progress(f"the {name} answers, question", len(pairs)) as ticker:
        ticker.skip(len(pairs) - len(missing))
        for pair in missing:
            text = answer(model.whole, model.tokenizer, pair["question"], max_new_tokens, True, 0.0)
            pair["answers"][name] = "".join(text).strip()
            keep()
            ticker.advance()


def _vote(pairs: Sequence[Any], judge: Judge, seed: int, keep) -> None:
    """Every pair in both orders; all ballots shuffled, so that the two of a pair lie apart."""
    ballots = [(pair, order) for pair in pairs for order in ("child first", "parent first")]
    random.Random(seed).shuffle(ballots)
    missing = [(pair, order) for pair, order in ballots if pair["votes"].get(order, NO_VERDICT) == NO_VERDICT]
    with progress("votes", len(missing)) if judge.automatic else nullcontext() as ticker:
        for pair, order in missing:
            child, parent = pair["answers"]["child"], pair["answers"]["parent"]
            shown = (child, parent) if order == "child first" else (parent, child)
            pair["votes"][order] = judge.vote(pair["question"], *shown)
            keep()
            if ticker is not None:
                ticker.advance()


def outcome(votes: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Wins, ties and losses of the child. It wins or loses a pair only where both orders say so.

    `score` counts a win as 1 and a tie as a half; 0.5 is a draw. Its 95 % interval is Wilson's. `agree` is the share
    of pairs on which both orders say the same, `first_votes` the share of decided votes for what came first. Pairs that
    lack a verdict do not count.

    Raises:
        EngineError: all lack one.
    """
    points = []
    judged = [pair for pair in votes if NO_VERDICT not in pair.values()]
    if not judged:
        raise EngineError(
            "The judge's replies were empty, or nothing but thoughts; name one that answers within "
            f"{VERDICT_TOKENS} tokens. The same command asks again."
        )
    for pair in judged:
        wins = (pair["child first"] == "first") + (pair["parent first"] == "second")
        losses = (pair["child first"] == "second") + (pair["parent first"] == "first")
        points.append(1.0 if wins == 2 else 0.0 if losses == 2 else 0.5)
    score = sum(points) / len(points)
    low, high = wilson_interval(score, len(points))
    every = [vote for pair in judged for vote in pair.values()]
    decided = [vote for vote in every if vote in ("first", "second")]
    swapped = {"first": "second", "second": "first"}
    agree = [
        swapped.get(pair["child first"], pair["child first"]) == pair["parent first"] != UNCLEAR for pair in judged
    ]
    return {
        "questions": len(points),
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "score": score,
        "score_low": low,
        "score_high": high,
        "agree": sum(agree) / len(agree),
        "first_votes": decided.count("first") / len(decided) if decided else None,
        "unclear_votes": every.count(UNCLEAR),
        "questions_without_verdict": len(votes) - len(judged),
    }


def show_judgement(found: Mapping[str, Any]) -> str:
    """A few sentences."""
    low, high = found["score_low"], found["score_high"]
    verdict = "no significant difference"
    if low > 0.5 or high < 0.5:
        verdict = "the child is better" if low > 0.5 else "the child is worse"
    lines = [
        f"Child against parent on {found['questions']} questions, judged by {found['judge']}:",
        f"  {found['wins']} wins, {found['ties']} ties, {found['losses']} losses",
        f"  score {found['score']:.3f} [{low:.3f}, {high:.3f}], 0.5 is a draw: {verdict}",
        f"  both orders agree on {100 * found['agree']:.0f} % of the questions",
    ]
    if found["first_votes"] is not None:
        lines.append(f"  {100 * found['first_votes']:.0f} % of the decided votes went to the answer shown first")
    if found["unclear_votes"]:
        lines.append(f"  {found['unclear_votes']} votes could not be read and count as ties")
    if found["questions_without_verdict"]:
        lines.append(
            f"  {found['questions_without_verdict']} more questions got no verdict; the same command asks again"
        )
    return "\n".join(lines)
