"""The same small run by two versions of this project in turns: speed of each stage, scores, and the child's KL.

OLD and NEW are checkouts that run in this environment (git worktree add OLD COMMIT). SmolLM2-135M-Instruct, three of
its thirty layers searched. Scores are compared in float32, where versions may differ by the order of sums alone;
everything else is as a run does it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common import SMOLLM2, by_arithmetic, report
from puzzle_nas.artifacts import read_json as content

SEARCHED = (2, 14, 27)
RECIPE = {
    "parent": SMOLLM2,
    "data": {
        "sources": [{"source": "python-stdlib"}],
        "train_tokens": 65536,
        "calibration_tokens": 8192,
        "scoring_tokens": 2048,
        "selection_tokens": 4096,
        "validation_tokens": 4096,
    },
    "search_space": {
        "kv_heads": [1],
        "width_fractions": [0.5, 0.25],
        "layers": {layer: [] for layer in range(30) if layer not in SEARCHED},
    },
    "costs": {"mixtures": 2},
    "bld": {"tokens": 16384, "batch_tokens": 2048},
    "search": {"limits": {"parameters": 130_000_000}},
    "gkd": {"tokens": 32768, "batch_tokens": 2048},
}
IN_FLOAT32 = {"precision": "float32", "data.scoring_tokens": 512, "bld.tokens": 2048}
SINCE = {"old": (), "new": ("search.effort=fast",)}
"""Settings that only one of them knows: what the old version's search did by itself."""
STAGES = ("build-library", "distill-blocks", "score-blocks", "distill-child", "evaluate-child")
"""Done again in turns."""


def puzzle(checkout: Path, *arguments: str | Path) -> None:
    """The command line of a checkout."""
    command = [sys.executable, "-m", "puzzle_nas", *map(str, arguments)]
    subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True)


def scores(folder: Path) -> dict[str, float]:
    """KL of each variant in the parent, nats per token."""
    return {path.stem: content(path)["kl_nats"]["mean"] for path in folder.rglob("scores/main/*/layer_*.json")}


def ratio(name: str, seconds: Mapping[str, list[float]]) -> Iterator[tuple[str, float]]:
    """Above 1 where the new version is faster."""
    medians = {version: statistics.median(values) for version, values in seconds.items()}
    for version, value in medians.items():
        yield f"seconds_{name}_{version}", value
    yield f"speed_of_new_over_old_{name}", medians["old"] / medians["new"]


def compared(runs: Mapping[str, Path], exact: Mapping[str, Path], turns: int, checkouts: Mapping[str, Path]):
    """Times in turns, then what came out."""
    for stage in STAGES[:-1]:
        seconds: dict[str, list[float]] = {version: [] for version in runs}
        for _, (version, run) in itertools.product(range(turns), runs.items()):
            puzzle(checkouts[version], stage, run, "--again")
            seconds[version].append(content(run / "seconds" / f"{stage.replace('-', '_')}.json")["seconds"])
        yield from ratio(stage, seconds)
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _, (version, run) in itertools.product(range(2 * turns), runs.items()):
        puzzle(checkouts[version], STAGES[-1], run, "--again")
        for scenario in content(run / "measured.json")["scenarios"].values():
            for model, part in itertools.product(("parent", "child"), ("prefill", "decode_step")):
                of_this = times.setdefault((model, part), {version: [] for version in runs})
                of_this[version].append(scenario[model][f"{part}_ms"] / 1e3)
    for (model, part), seconds in times.items():
        yield from ratio(f"{part}_{model}", seconds)
    for version, run in runs.items():
        yield f"kl_nats_child_{version}", content(run / "evaluation.json")["child"]["distilled"]["kl_nats"]
    before, after = scores(exact["old"]), scores(exact["new"])
    yield "scores_compared", len(before)
    yield "largest_difference_of_scores_nats", max(abs(before[name] - after[name]) for name in before | after)


def main(old: Path, new: Path, turns: int = 2, folder: Path | None = None) -> None:
    """See above; runs are kept in the folder where one is given."""
    checkouts = {"old": old.resolve(), "new": new.resolve()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (folder or Path(scratch)).resolve()
        folder.mkdir(exist_ok=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(RECIPE))
        exact = {version: folder / f"{version}-float32" for version in checkouts}
        runs = {version: folder / version for version in checkouts}
        for version, checkout in checkouts.items():
            changes = [*(f"{key}={value}" for key, value in IN_FLOAT32.items()), *SINCE[version]]
            puzzle(checkout, "run", recipe, "--run-dir", exact[version], *changes, "--to", "prepare-data")
            for stage in STAGES[:3]:
                puzzle(checkout, stage, exact[version])
            puzzle(checkout, "run", recipe, "--run-dir", runs[version], *SINCE[version])
        report(by_arithmetic("two_versions"), dict(compared(runs, exact, turns, checkouts)))
