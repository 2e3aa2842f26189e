"""Puzzle, figure 4: are the answers of the child or of its parent better, to a judge who does not know whose they are?

The judge is a model behind an OpenAI-compatible endpoint, `--judge http://127.0.0.1:8000/v1 --model NAME`. Without one
it is the run's own parent, served from its GGUF by llama.cpp: too small a judge, and this says so. For whether a judge
is of any use is measured first: of the parent's answer to a question and its answer to another one, it must prefer the
former.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.paper.common import Budget, Children, Measured, Table
from puzzle_nas.artifacts import fingerprint, read_json, write_bytes, write_json
from puzzle_nas.engines import serving_engine
from puzzle_nas.engines.server import served
from puzzle_nas.evaluation.judge import Endpoint, Judge, judge_child, outcome

FOLDER = Path("runs/benchmark-paper/judge")
PORT = 18_441
ANSWER_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Name three animals that live in the sea.",
    "What is 7 times 8?",
    "Write a short poem about rain.",
    "What does a doctor do?",
    "How many days are there in a week?",
    "Why do we sleep?",
    "What is a computer program?",
    "Give me two tips for saving money.",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of hot?",
    "How does a bicycle stay upright?",
    "Describe a sunset in one sentence.",
    "What is photosynthesis?",
    "Name a country in South America.",
    "How do I write a polite email to ask for a day off?",
    "What is the largest planet of the solar system?",
    "Why should I drink water?",
    "Explain what a friend is to a child.",
    "What colours are in the rainbow?",
    "How do plants get water?",
    "What can I cook with rice and tomatoes?",
)
CONTROLS = 12
"""Questions on which the judge itself is judged."""


def control(judge: Judge, pairs: list[dict]) -> dict:
    """What the judge says of the parent's answers against its answers to the next question; kept."""
    answers = [pair["answers"]["parent"] for pair in pairs[: CONTROLS + 1]]
    path = FOLDER / f"control-{fingerprint([judge.name, answers])}.json"
    votes = read_json(path) if path.exists() else []
    for place in range(len(votes), CONTROLS):
        question, own, other = pairs[place]["question"], answers[place], answers[place + 1]
        votes.append(
            {"child first": judge.vote(question, own, other), "parent first": judge.vote(question, other, own)}
        )
        write_json(path, votes)
    return outcome(votes)


def measure(budget: Budget, judge: str | None, model: str | None) -> Measured:
    """Both answer greedily; each pair is judged in both orders."""
    run, questions = Children(budget).run, FOLDER / "questions.txt"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    write_bytes(questions, "\n".join(QUESTIONS).encode())
    with ExitStack() as stack:
        if judge is None:
            link = FOLDER / "model.gguf"
            link.unlink(missing_ok=True)
            link.symlink_to(next((run / "download").rglob("*.gguf")).resolve())
            server = stack.enter_context(served(serving_engine("llama.cpp"), FOLDER, PORT))
            endpoint = Endpoint(f"http://127.0.0.1:{PORT}/v1", server.model)
        else:
            endpoint = Endpoint(judge, model or "")
        kept = FOLDER / f"{budget.name}-{fingerprint(endpoint.name)}.json"
        found = judge_child(run.path, None, questions, endpoint, ANSWER_TOKENS, kept)
        checked = control(endpoint, found["pairs"])
    columns = {
        column: {"child against parent": found[key], "parent against its answer to another question": checked[key]}
        for column, key in (
            ("score", "score"),
            ("from", "score_low"),
            ("to", "score_high"),
            ("shown first", "first_votes"),
        )
    }
    different = {of: len({pair["answers"][of] for pair in found["pairs"]}) for of in ("child", "parent")}
    of_use = checked["score_low"] > 0.5
    claims = {"no significant difference": found["score_low"] <= 0.5 <= found["score_high"]} if of_use else {}
    remark = (
        f"{found['questions']} questions: {found['wins']} wins, {found['ties']} ties, {found['losses']} losses, "
        f"{found['unclear_votes']} of {2 * found['questions']} votes unreadable. The child gives {different['child']} "
        f"different answers, the parent {different['parent']}. The judge is "
        + (f"{model}." if judge else "the parent itself, the only model at hand.")
    )
    if not of_use:
        remark += (
            f" It is of no use: for the parent's answer against its answer to another question it gives "
            f"{checked['score']:.2f} ({checked['score_low']:.2f} to {checked['score_high']:.2f}) on {CONTROLS} "
            f"questions, {checked['unclear_votes']} of {2 * CONTROLS} votes unreadable. Name a better one with --judge "
            "and --model."
        )
    return Measured(columns, claims, remark)


ROWS = {"child against parent": "no significant difference"}
OURS = "score with its 95 % interval (0.5 is a draw), and the share of decided votes for what was shown first"
TABLE = Table("figure_4", "Figure 4: blind preference", "finding", ROWS, OURS, measure, ("judge", "model"))

if __name__ == "__main__":
    TABLE.main()
