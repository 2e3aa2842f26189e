"""The same small run by two versions of this project in turns: speed of each stage, scores, and the child's KL.

OLD and NEW are checkouts that run in this environment (git worktree add OLD COMMIT). SmolLM2-135M-Instruct, three of
its thirty layers searched. Both get the old version's blocks of tokens. Scores are compared in float32, where
versions may differ by the order of sums alone; everything else is as a run does it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import SMOLLM2, by_arithmetic, kept, report
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.artifacts import read_json as content
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import parent_checkpoint

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
LAST_MATRICES = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}
STAGES = ("build-library", "distill-blocks", "score-blocks", "distill-child", "evaluate-child")
"""Done again in turns."""


def puzzle(checkout: Path, *arguments: str | Path) -> None:
    """The command line of a checkout."""
    command = [sys.executable, "-m", "puzzle_nas", *map(str, arguments)]
    subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True)


def take_text(new: Path, old: Path) -> None:
    """Give one run the other's blocks of tokens: versions may cut text otherwise."""
    for file in (old / "data").iterdir():
        shutil.copy(file, new / "data")
    record = Path("stages/prepare_data.json")
    write_json(new / record, content(old / record) | {"made_from": content(new / record)["made_from"]})


def scores(folder: Path) -> dict[str, float]:
    """KL of each variant in the parent, nats per token."""
    return {path.stem: content(path)["kl_nats"]["mean"] for path in folder.rglob("scores/main/*/layer_*.json")}


def ratio(name: str, seconds: Mapping[str, list[float]]) -> Iterator[tuple[str, float]]:
    """Above 1 where the new version is faster."""
    medians = {version: statistics.median(values) for version, values in seconds.items()}
    for version, value in medians.items():
        yield f"seconds_{name}_{version}", value
    yield f"speed_of_new_over_old_{name}", medians["old"] / medians["new"]


def compared(runs: Mapping[str, Path], turns: int, checkouts: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
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


def compared_scores(exact: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
    """One version's scores against the other's, and both against what transformers alone computes."""
    found = {version: scores(run) for version, run in exact.items()}
    yield "scores_compared", len(found["old"])
    differences = [score - found["old"][name] for name, score in found["new"].items()]
    yield "largest_difference_of_scores_nats", max(map(abs, differences))
    yield "mean_difference_of_scores_nats", statistics.mean(differences)
    yield "standard_deviation_of_differences_nats", statistics.pstdev(differences)
    known = scores_without_sub_blocks(RunFolder(exact["new"]))
    for version in found:
        errors = [abs(found[version][name] - score) for name, score in known.items()]
        yield f"largest_error_of_no_op_scores_nats_{version}", max(errors)


@torch.inference_mode()
def scores_without_sub_blocks(run: RunFolder) -> dict[str, float]:
    """The no-ops' scores from transformers' own model, whose last matrix of the sub-block is set to 0."""
    model = AutoModelForCausalLM.from_pretrained(parent_checkpoint(run), dtype=torch.float32).eval()
    tokens = load_tokens(run, "scoring").long()
    parent = model(tokens).logits.double().log_softmax(-1)
    found = {}
    for layer, (slot, matrix) in itertools.product(SEARCHED, LAST_MATRICES.items()):
        weight = model.get_parameter(f"model.layers.{layer}.{matrix}.weight")
        own = weight.clone()
        weight.zero_()
        child = model(tokens).logits.double().log_softmax(-1)
        found[f"layer_{layer:02d}.{slot}.no_op"] = (parent.exp() * (parent - child)).sum(-1).mean().item()
        weight.copy_(own)
    return found


def main(old: Path, new: Path, turns: int = 2, folder: Path | None = None) -> None:
    """See above; runs are kept in the folder where one is given. With no turns, only scores are compared."""
    checkouts = {"old": old.resolve(), "new": new.resolve()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (folder or Path(scratch)).resolve()
        folder.mkdir(exist_ok=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(RECIPE))
        exact = {version: folder / f"{version}-float32" for version in checkouts}
        runs = {version: folder / version for version in checkouts}
        for version, checkout in checkouts.items():
            in_float32 = [*(f"{key}={value}" for key, value in IN_FLOAT32.items()), *SINCE[version]]
            for run, settings in ((exact, in_float32), *([(runs, SINCE[version])] if turns else ())):
                puzzle(checkout, "run", recipe, "--run-dir", run[version], *settings, "--to", "prepare-data")
                if version == "new":
                    take_text(run["new"], run["old"])
            for stage in STAGES[:3]:
                puzzle(checkout, stage, exact[version])
            if turns:
                puzzle(checkout, "run", recipe, "--run-dir", runs[version], *SINCE[version])
        name = by_arithmetic("two_versions")
        times = dict(compared(runs, turns, checkouts)) if turns else kept(name)
        report(name, times | dict(compared_scores(exact)))
