"""A parent alone, and with drafts in greedy speculative decoding, on llama.cpp, in turns.

Drafts are the parent quantised by llama.cpp, the run's distilled child, and what `puzzle search RUN --for draft`
predicted, where it has been asked: the best of those and some others, assembled and refitted as the search does. Every
prompt is continued by the parent alone and with each number of drafts; what comes out must be the same. Prompts are
questions in the parent's chat template, and beginnings of the run's validation text.

    tokens_per_second_parent        decode steps, alone; the prompt's pass is left out throughout
    pass_over_N                     a pass of the parent over N tokens, over one of one token
    cost_ratio_DRAFT                a decode step of the draft, over the parent's
    acceptance_DRAFT, _chat, _text  accepted, of the drafts up to the first that is not
    speedup_DRAFT_kK                K drafts for each pass, over the parent alone: the median of the repeats
    arithmetic_DRAFT_kK             the same from the measured ratio, passes and acceptance (choosing/speculation.py)
    predicted_DRAFT                 as the search predicted it, with its acceptance: predicted_acceptance_DRAFT
    same_tokens                     share of the continuations that are the parent's own, token by token
    largest_gap_where_they_differ   of the two most likely tokens at the first that differs, in nats

With --parent q8_0 the parent is itself quantised. Adds to results/draft.json under a name of its own.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.common import RESULTS, RunArgument, kept, report
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.refinement import REFIT_TOKENS
from puzzle_nas.choosing.speculation import expected_tokens, speedup
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import LlamaCppEngine
from puzzle_nas.engines.worker import Worker
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import load_parent, load_tokenizer, parent_checkpoint
from puzzle_nas.library import assemble
from puzzle_nas.machine import describe, machine_of, usable_cores
from puzzle_nas.parents.chat import ChatTemplate
from puzzle_nas.parents.tokenizer import prompt_ids
from puzzle_nas.pipeline import open_run
from puzzle_nas.training.refitting import refit

DRAFTS = (1, 2, 4)
PASSES = (1, 2, 3, 4, 5, 7, 9, 17, 33, 65)
NUM_TOKENS = 64
TEXT_PROMPTS, TEXT_TOKENS = 4, 48
QUESTIONS = (
    "What is the capital of France?",
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I make a good cup of tea?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me three tips for sleeping better.",
)


def gguf(child: Child, folder: Path, quantise: str | None = None) -> Path:
    """A folder with the model's file, in its formats, in bfloat16 what has none."""
    folder.mkdir(parents=True)
    EXPORTERS["gguf"].write(child, folder, "bfloat16")
    if quantise:
        LlamaCppEngine().quantise(folder, quantise)
    return folder


def predicted_drafts(run: RunFolder) -> dict[str, dict]:
    """By name, some rows of the search for drafts, the best among them."""
    if not run.drafts.is_file():
        return {}
    found = read_json(run.drafts)
    rows = found["rows"]
    places = {len(rows) // 4, len(rows) // 2, rows.index(found["best"])}
    return {f"child{rows[place]['cost_ratio']:.2f}": rows[place] for place in sorted(places)}


def main(
    run_dir: RunArgument = Path("runs/quickstart"),
    parent: Annotated[Literal["bfloat16", "q8_0"], typer.Option(metavar="TYPE")] = "bfloat16",
    repeats: int = 3,
) -> None:
    """Export, load all, time in turns, print and save."""
    run, engine = RunFolder(run_dir), LlamaCppEngine()
    recipe = open_run(run)
    tokenizer, model = load_tokenizer(parent_checkpoint(run)), load_parent(recipe, run)
    template = ChatTemplate.of(tokenizer)
    texts = [
        template.render([{"role": "user", "content": q}], add_generation_prompt=True) for q in QUESTIONS if template
    ]
    prompts = [("chat", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    prompts += [("chat", list(prompt_ids(tokenizer, question))) for question in QUESTIONS if not template]
    blocks = load_tokens(run, "validation")
    step = max(1, len(blocks) // TEXT_PROMPTS)
    prompts += [("text", block[:TEXT_TOKENS].tolist()) for block in blocks[::step][:TEXT_PROMPTS]]
    predicted = predicted_drafts(run) if parent == "bfloat16" else {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Worker(
            engine.name, engine.python(), Path(__file__).with_name("draft_worker.py"), engine.environment()
        ) as worker,
    ):
        folder = Path(scratch)
        own = Child(model, None)
        files = {"parent": gguf(own, folder / "parent", None if parent == "bfloat16" else parent)}
        for kind in ("q8_0", "q4_0") if parent == "bfloat16" else ("q4_0",):
            files[f"parent@{kind}"] = gguf(own, folder / kind, kind)
        if (run / "child-gkd").is_dir():
            files["distilled"] = gguf(Child.load(run / "child-gkd"), folder / "distilled")
        calibration = load_tokens(run, "calibration")
        calibration = calibration[: max(1, REFIT_TOKENS // calibration.shape[1])]
        for name, row in predicted.items():
            child = assemble(run, model, Architecture.from_list(row["architecture"]), recipe.final_library)
            matrices = refit(model, child, calibration)
            files[name] = gguf(Child(child, None, matrices=matrices), folder / name)
        for name, file in files.items():
            worker.ask("load", name=name, folder=str(file.resolve()), threads=usable_cores())
        figures = measured(worker, list(files)[1:], prompts, repeats)
    for name, row in predicted.items():
        figures[f"predicted_{name}"] = row["speedup_predicted"]
        figures[f"predicted_acceptance_{name}"] = row["acceptance_predicted"]
        figures[f"predicted_cost_ratio_{name}"] = row["cost_ratio"]
    earlier = kept("draft") if (RESULTS / "draft.json").is_file() else {}
    figures = {f"{parent}: {name}": round(value, 5) for name, value in figures.items()}
    report("draft", earlier | figures, describe(machine_of(recipe)))


def measured(worker: Worker, names: list[str], prompts: list[tuple[str, list[int]]], repeats: int) -> dict[str, float]:
    """All figures but the predicted ones."""
    of_text = prompts[-1][1]
    figures: dict[str, float] = {}

    def times(model: str, sizes: tuple[int, ...]) -> list[float]:
        prompt = (of_text * (1 + max(sizes) // len(of_text)))[: max(max(sizes), len(of_text))]
        return worker.ask("time_passes", model=model, prompt=prompt, sizes=sizes, repeats=20)

    of_parent = times("parent", PASSES)
    passes = {size - 1: value / of_parent[0] for size, value in zip(PASSES, of_parent, strict=True)}
    figures["decode_step_ms_parent"] = of_parent[0]
    figures |= {f"pass_over_{drafts + 1}": value for drafts, value in passes.items()}
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    tokens: dict[int, list[int]] = {}
    same, tried, gaps = 0, 0, [0.0]
    for repeat in range(repeats):
        for number, (kind, prompt) in enumerate(prompts):
            alone = worker.ask("alone", model="parent", prompt=prompt, num_tokens=NUM_TOKENS)
            seconds["parent", repeat].append(alone["seconds"])
            tokens[number] = alone["tokens"]
            for name in names:
                for drafts in DRAFTS:
                    with_drafts = worker.ask(
                        "drafted", model="parent", draft=name, prompt=prompt, num_tokens=NUM_TOKENS, drafts=drafts
                    )
                    seconds[f"{name}_k{drafts}", repeat].append(with_drafts["seconds"])
                    counts[name, kind][0] += with_drafts["accepted"]
                    counts[name, kind][1] += with_drafts["compared"]
                    pairs = zip(with_drafts["tokens"], alone["tokens"], strict=True)
                    differs = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
                    same, tried = same + (differs is None), tried + 1
                    if differs is not None and repeat == 0:
                        by_place = worker.ask("top_two_gaps", model="parent", prompt=prompt, tokens=alone["tokens"])
                        gaps.append(by_place[differs])
            print(f"repeat {repeat + 1}/{repeats}, prompt {number + 1}/{len(prompts)}", flush=True)

    def total(name: str, repeat: int) -> float:
        return sum(seconds[name, repeat])

    written = len(prompts) * (NUM_TOKENS - 1)
    figures["tokens_per_second_parent"] = written / statistics.median(total("parent", r) for r in range(repeats))
    figures |= {"same_tokens": same / tried, "largest_gap_where_they_differ": max(gaps)}
    for name in names:
        ratio = times(name, (1,))[0] / times("parent", (1,))[0]
        figures[f"cost_ratio_{name}"] = ratio
        for kind in ("chat", "text"):
            figures[f"acceptance_{name}_{kind}"] = counts[name, kind][0] / counts[name, kind][1]
        accepted, compared = (sum(counts[name, kind][i] for kind in ("chat", "text")) for i in (0, 1))
        figures[f"acceptance_{name}"] = acceptance = accepted / compared
        for drafts in DRAFTS:
            ratios = [total("parent", r) / total(f"{name}_k{drafts}", r) for r in range(repeats)]
            figures[f"speedup_{name}_k{drafts}"] = statistics.median(ratios)
            figures[f"arithmetic_{name}_k{drafts}"] = speedup(acceptance, ratio, drafts, passes.__getitem__)
        figures[f"break_even_cost_ratio_{name}"] = max(
            (expected_tokens(acceptance, drafts) - passes[drafts]) / drafts for drafts in DRAFTS
        )
    return figures
