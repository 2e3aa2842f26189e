"""What each source of distillation text does for general text.

GKD from the quickstart's refitted child on equally many tokens of each source, measured on the mix in
../shared/data/validation (books, code, mail, documentation, ...). Of its code the Python library holds a part, of the
rest next to nothing: continuations.py counts it.
Needs a finished runs/quickstart and ../shared/data. python benchmarks/data_sources.py [TOKENS]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from results import save

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, machine_of
from puzzle_nas.recipe import Recipe, parse_recipe
from puzzle_nas.stages.distill_child import Training
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.parent_outputs import LiveParent

BASE = RunFolder("runs/quickstart")
FOLDER = Path("runs/benchmark-data-sources")
SHARED = Path("../shared/data")
SOURCES = {
    "python_stdlib": [("python-stdlib", 1.0)],
    "parent_samples": [("parent-samples", 1.0)],
    "stdlib_1_samples_1": [("python-stdlib", 1.0), ("parent-samples", 1.0)],
    "general_text": [(f"{SHARED}/train/*.jsonl.gz", 1.0)],
}
SMALL = {"calibration_tokens": 256, "scoring_tokens": 256, "selection_tokens": 256, "validation_tokens": 256}


def prepared(name: str, sources: list[tuple[str, float]], tokens: int, **sizes: int) -> tuple[Recipe, RunFolder]:
    """A run folder that holds the text of some sources."""
    run = RunFolder(FOLDER / name)
    settings = pipeline.open_run(BASE).model_dump(mode="json")
    settings["data"] |= SMALL | {"train_tokens": tokens} | sizes
    settings["data"]["sources"] = [{"source": source, "weight": weight} for source, weight in sources]
    settings["gkd"] |= {"tokens": tokens, "evaluate_every_steps": 10**6}
    import yaml

    recipe = parse_recipe(yaml.safe_dump(settings))
    for part in (
        "parent",
        "parent.json",
        "stages/prepare_parent.json",
        "stages/prepare_parent.begun.json",
        "data/sources",
    ):
        target = run / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            (shutil.copytree if (BASE / part).is_dir() else shutil.copy)(BASE / part, target)
    pipeline.claim_run(recipe, run)
    pipeline.run_stage(pipeline.stage_named("prepare-data"), recipe, run)
    return recipe, run


def main() -> None:
    """Print KL before and after for each source, and keep the figures."""
    if not SHARED.is_dir():
        raise SystemExit(f"This benchmark measures on {SHARED}, which is not here.")
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 24576
    _, general = prepared("validation", [(f"{SHARED}/validation/*.jsonl.gz", 1.0)], 256, validation_tokens=16384)
    parent, _ = load_parent(BASE)
    start = load_model(BASE / "child-refit", machine_of(pipeline.open_run(BASE)))
    reference = ParentReference(parent, load_tokens(general, "validation"))
    figures: dict[str, float] = {"gkd_tokens": tokens, "general_kl_nats.before": reference.compare(start).kl_nats}
    print(f"{'before':20s} {figures['general_kl_nats.before']:.4f}", flush=True)
    for name, sources in SOURCES.items():
        recipe, run = prepared(name, sources, tokens)
        shutil.rmtree(run.scratch("distill_child"), ignore_errors=True)
        training = Training(recipe, run, LiveParent(parent), start)
        training.train()
        child = training.child.to(torch.bfloat16 if parent.dtype == torch.bfloat16 else torch.float32)
        figures[f"general_kl_nats.{name}"] = reference.compare(child).kl_nats
        print(f"{name:20s} {figures[f'general_kl_nats.{name}']:.4f}", flush=True)
    print("Written to", save("data_sources", figures))


if __name__ == "__main__":
    main()
