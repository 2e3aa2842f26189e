"""What the quickstart's child lost, by domain of text, task and length; kept in the run for its report as well.

Text and tasks are files of ../shared/data; without them there is nothing to measure. One task more is that of
continuations.py, which makes it and counts what the run has read of the text before.
python benchmarks/evaluation.py [RUN]: about ten minutes on two cores
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from results import save
from task_accuracy import CONTINUATIONS

from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.evaluation.evaluate import Asked, evaluate, evaluation_path

DATA = Path("../shared/data")
ITEMS = 300
"""Of each task."""
LONGEST = 2048
QUESTIONS = 20


def main() -> None:
    """Evaluate part by part, skipping what is kept of this child; print and save."""
    run = RunFolder(sys.argv[1] if len(sys.argv) > 1 else "runs/torch")
    texts, tasks = sorted(DATA.glob("validation/*.jsonl.gz")), sorted(DATA.glob("benchmarks/*.jsonl.gz"))
    if not texts or not tasks:
        raise SystemExit(f"{DATA} is not here: nothing to evaluate on.")
    if not CONTINUATIONS.exists():
        raise SystemExit(f"{CONTINUATIONS} is missing. Make it with: python benchmarks/continuations.py")
    tasks.append(CONTINUATIONS)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    asked = {
        "tasks": Asked(tasks=tuple(map(str, tasks)), limit=ITEMS),
        "long_context": Asked(data=tuple(map(str, texts)), long_context=True, max_length=LONGEST, questions=QUESTIONS),
    }
    child = read_json(run.path / "stages/distill_child.json")["outputs_fingerprint"]
    for name, what in asked.items():
        path = evaluation_path(run, name)
        kept = read_json(path) if path.exists() else {}
        labels = {Path(task).name.split(".")[0] for task in what.tasks}
        if kept.get("made_from") != child or kept.get("limit") != what.limit or labels - set(kept.get("tasks", ())):
            evaluate(run.path, None, what)
    text, tasks, long_context = (read_json(evaluation_path(run, name)) for name in ("text", "tasks", "long_context"))
    figures: dict[str, float] = {}
    for domain, found in {**text["domains"], "all": text["all"]}.items():
        figures[f"kl_nats_{domain}"] = found["kl_nats"]["mean"]
        figures[f"perplexity_ratio_{domain}"] = found["perplexity_ratio"]["mean"]
    for task, found in tasks["tasks"].items():
        figures |= {
            f"accuracy_child_{task}": found["score"]["mean"],
            f"accuracy_parent_{task}": found["parent_score"]["mean"],
            f"chance_{task}": found["chance"],
            f"parent_above_chance_{task}": float(found["counted"]),
        }
        if found["counted"]:
            figures |= {f"preserved_{task}_{part}": value for part, value in found["preserved"].items()}
    if tasks["average_preserved"] is not None:
        figures["accuracy_preserved_average"] = tasks["average_preserved"]["mean"]
    for length, row in long_context["lengths"].items():
        figures[f"kl_nats_at_{length}"] = row["text"]["kl_nats"]["mean"]
        figures[f"answers_found_parent_at_{length}"] = row["average"]["parent_score"]["mean"]
        figures[f"answers_found_child_at_{length}"] = row["average"]["score"]["mean"]
    for key, value in figures.items():
        print(f"{key:45s} {value:.4f}")
    print("Written to", save("evaluation", figures))


if __name__ == "__main__":
    main()
