"""What lowers KL fastest for the same tokens of GKD, one thing changed at a time; and what less memory costs.

From the quickstart's refitted child, with its text; needs a finished runs/torch. KL on the selection split, as a
choice is made there. What is finished lies in runs/benchmark-gkd/ and is not run again; an interrupted run goes on.
python benchmarks/gkd.py [NAME...]: those only, for pieces of a few minutes; without names everything.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from results import by_arithmetic, save

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import parent_of
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import Anatomy, architecture_of, load_model
from puzzle_nas.machine import machine_of
from puzzle_nas.recipe import OptimiserSettings, parse_recipe
from puzzle_nas.stages import distill_child
from puzzle_nas.training import optimiser
from puzzle_nas.training.distillation import Training, parent_outputs
from puzzle_nas.training.losses import cosine_loss
from puzzle_nas.training.optimiser import learning_rate_at

BASE = RunFolder("runs/torch")
FOLDER = Path("runs/benchmark-gkd")
FEW, SHORT, LONG = 8_192, 16_384, 49_152
PLAIN = {"optimiser": "adamw", "learning_rate": 1e-4, "batch_tokens": 512, "cosine_weight": 0.0, "tokens": SHORT}
MUON = {"optimiser": "muon", "learning_rate": 3e-4}
ONE_BATCH = {"tokens": 4096, "batch_tokens": 4096}
VARIANTS = {
    "adamw_1e-4": {},
    "adamw_3e-4": {"learning_rate": 3e-4},
    "adamw_5e-5": {"learning_rate": 5e-5},
    "muon_3e-4": MUON,
    "cosine_weight_1": {"cosine_weight": 1.0},
    "batch_256": {"batch_tokens": 256},
    "batch_1024": {"batch_tokens": 1024},
    "lora_16_1e-3": {"lora_rank": 16, "learning_rate": 1e-3},
    "top_64": {"parent_top_k": 64},
    "long_adamw_1e-4": {"tokens": LONG},
    "long_muon_3e-4": {"tokens": LONG, **MUON},
    "long_batch_256": {"tokens": LONG, "batch_tokens": 256},
    "memory": ONE_BATCH,
    "memory_micro_batch": {**ONE_BATCH, "micro_batch_tokens": 256},
    "memory_checkpointing": {**ONE_BATCH, "gradient_checkpointing": True},
    "memory_lora_16": {**ONE_BATCH, "lora_rank": 16},
    "memory_all_and_top_64": {
        **ONE_BATCH,
        "micro_batch_tokens": 256,
        "gradient_checkpointing": True,
        "lora_rank": 16,
        "parent_top_k": 64,
    },
    **{
        f"few_{name}": {"tokens": FEW, "learning_rate": 3e-5, **settings}
        for name, settings in {
            "adamw_1e-4": {"learning_rate": 1e-4},
            "adamw_3e-5": {},
            "adamw_1e-5": {"learning_rate": 1e-5},
            "lm_alone": {"kl_weight": 0.0, "lm_weight": 1.0},
            "cosine_weight_1": {"cosine_weight": 1.0},
            "sequences_512": {},
            "replaced_alone_train": {},
            "replaced_3x_rate": {},
        }.items()
    },
    **{
        f"schedule_{name}": settings
        for name, settings in {
            "default": {},
            "constant_rate": {"final_learning_rate_fraction": 1.0},
            "rate_to_zero": {"final_learning_rate_fraction": 0.0},
            "no_warmup": {"warmup_fraction": 0.0},
            "cosine_weight_1": {"cosine_weight": 1.0},
            "cosine_last_third": {"cosine_weight": 1.0},
            "sequences_128": {},
            "sequences_512": {},
            "half_twice": {},
            "in_order": {},
            "embeddings_train": {"train_embeddings": True},
            "decay_last_fifth": {},
            "rate_2e-4": {"learning_rate": 2e-4},
            "constant_rate_sequences_128": {"final_learning_rate_fraction": 1.0},
            "long_default": {"tokens": LONG},
            "long_constant_rate": {"tokens": LONG, "final_learning_rate_fraction": 1.0},
        }.items()
    },
}
GROUPS = {"few": "gkd_few", "schedule": "gkd_schedule"}
"""Figures of their own, by how names begin: these children are not those of the others, which are in gkd.json."""


def group(name: str) -> str:
    """The file of a variant's figures."""
    return GROUPS.get(name.split("_")[0], "gkd")


def other_data(name: str, run: RunFolder) -> None:
    """The quickstart's data with its training text in sequences of another length, or half as much as is read."""
    shutil.copytree(BASE / "data", run / "data")
    tokens, facts = load_tokens(BASE, "train"), read_json(run / "data/data.json")
    if name.endswith("half_twice"):
        tokens = tokens[: SHORT // 2 // tokens.shape[1]]
    else:
        length = int(name.rpartition("_")[2])
        tokens = tokens.flatten()[: tokens.numel() // length * length].view(-1, length)
    tokens = tokens.to(torch.int32).contiguous()
    safetensors.torch.save_file({"tokens": tokens}, run.split("train"))
    facts["splits"]["train"]["fingerprint"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    write_json(run / "data/data.json", facts)


def constant_then_linear(step: int, total_steps: int, settings: OptimiserSettings) -> float:
    """A linear warm-up, a constant rate, and in the last fifth a line to the final fraction (as MiniCPM has it)."""
    left = (total_steps - step) / (total_steps / 5)
    rate = learning_rate_at(step, total_steps, settings.model_copy(update={"final_learning_rate_fraction": 1.0}))
    return rate * max(settings.final_learning_rate_fraction, min(1.0, left))


def change(name: str, training: Training) -> None:
    """What no setting of a recipe does."""
    if name.endswith("cosine_last_third"):
        last = len(Anatomy(training.start).layers) // 3
        distill_child.cosine_loss = lambda ours, theirs, compiled: cosine_loss(ours[-last:], theirs[-last:], compiled)
    if name.endswith("decay_last_fifth"):
        optimiser.learning_rate_at = constant_then_linear
    if name.endswith("in_order"):
        first = SHORT // training.tokens.shape[1]
        training.batches = torch.arange(first).split(training.batch_sequences)
    if name.startswith("few_replaced"):
        parts, parents = Anatomy(training.start), parent_of(BASE)
        kept = {
            f"layers.{layer}.{prefix}"
            for layer, slot, spec in architecture_of(training.start.config)
            if spec == parents.layers[layer][slot]
            for prefix in parts.subblocks(layer)[slot].names()
        }
        parameters = training.optimiser.parameters
        slow = {id(p) for n, p in parameters.items() if "layers." not in n or any(k in n for k in kept)}
        print(f"{len(slow)} of {len(parameters)} parameters are in what the search kept")
        (adamw,) = training.optimiser.inner
        for group in list(adamw.param_groups):
            fast = [p for p in group["params"] if id(p) not in slow]
            group["params"] = [p for p in group["params"] if id(p) in slow]
            group["lr_factor"] = 0.0 if name == "few_replaced_alone_train" else 1.0
            if fast:
                adamw.add_param_group({**group, "params": fast, "lr_factor": 3.0 if "3x" in name else 1.0})

        def scale(optimiser, *_) -> None:
            for group in optimiser.param_groups:
                group["lr"] *= group["lr_factor"]

        adamw.register_step_pre_hook(scale)


def measured(name: str) -> dict:
    """The curve of one variant."""
    run, settings = RunFolder(FOLDER / name), {**PLAIN, **VARIANTS[name]}
    result = run / "result.json"
    if not result.exists():
        recipe = pipeline.open_run(BASE).model_dump(mode="json")
        steps = settings["tokens"] // settings["batch_tokens"]
        points = 1 if name.startswith("few") else 4
        recipe["gkd"] |= settings | {"evaluate_every_steps": max(1, steps // points)}
        if ("sequences" in name or "half" in name) and not (run / "data").exists():
            other_data(name, run)
        for part in ("parent", "parent.json", "data"):
            (run / part).parent.mkdir(parents=True, exist_ok=True)
            if not (run / part).exists():
                os.symlink((BASE / part).resolve(), run / part)
        recipe = parse_recipe(json.dumps(recipe))
        pipeline.claim_run(recipe, run)
        start = load_model(BASE / "child-refit", machine_of(recipe))
        training = Training(recipe, run, parent_outputs(recipe, run), start)
        change(name, training)
        begin = None if training.state_folder.exists() else time.process_time()
        training.train()
        # Unknown where an earlier process did a part.
        seconds = None if begin is None else time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {"settings": settings, "curve": training.curve}
        write_json(result, {**facts, "processor_seconds": seconds, "peak_memory_bytes": peak})
        shutil.rmtree(run.scratch("distill_child"))
    return read_json(result)


def tokens_until(curve: list[dict], kl: float, batch_tokens: int) -> float | None:
    """Where a curve first falls to `kl`, between its points in a straight line."""
    for before, after in itertools.pairwise(curve):
        high, low = before["selection_kl_nats"], after["selection_kl_nats"]
        if low <= kl <= high:
            return batch_tokens * (before["step"] + (after["step"] - before["step"]) * (high - kl) / (high - low))
    return None


def main() -> None:
    """Measure, print the table of all that is measured so far, and keep its figures."""
    names = sys.argv[1:] or list(VARIANTS)
    if len(names) == 1:
        measured(names[0])
    else:
        for name in names:
            # A process of its own each: peak memory is counted by process.
            subprocess.run([sys.executable, sys.argv[0], name], check=True, stdout=subprocess.DEVNULL)
    results: dict[str, dict[str, float]] = {}
    print(f"{'':36s}{'KL, nats':>10s}{'processor, s':>14s}{'peak, GB':>10s}")
    for name in VARIANTS:
        if not (FOLDER / name / "result.json").exists():
            continue
        result = measured(name)
        figures = results.setdefault(group(name), {"few_tokens": FEW, "tokens": SHORT, "long_tokens": LONG})
        kl, seconds = _kl(name, result["curve"]), result["processor_seconds"]
        figures["selection_kl_nats.before"] = result["curve"][0]["selection_kl_nats"]
        figures[f"selection_kl_nats.{name}"] = kl
        print(f"{name:36s}{kl:10.4f}", end="")
        if seconds is not None:
            figures[f"processor_seconds.{name}"] = round(seconds, 1)
        print(f"{'-' if seconds is None else round(seconds):>14}", end="")
        if name.startswith("memory"):
            figures[f"peak_memory_bytes.{name}"] = peak = result["peak_memory_bytes"]
            print(f"{peak / 1e9:10.2f}", end="")
        print(flush=True)
    figures = results.get("gkd", {})
    for length, tokens in (("", SHORT), ("long_", LONG)):
        adamw, muon = f"selection_kl_nats.{length}adamw_1e-4", f"{length}muon_3e-4"
        if adamw in figures and f"selection_kl_nats.{muon}" in figures:
            reached = tokens_until(measured(muon)["curve"], figures[adamw], 512)
            if reached is not None:
                figures[f"{length}gkd_tokens_to_same_kl_over_adamw"] = share = reached / tokens
                print(
                    f"Muon falls to the {figures[adamw]:.4f} of AdamW at 1e-4 on {share:.2f} of its {tokens:,} tokens"
                )
    for file, figures in results.items():
        print("Written to", save(by_arithmetic(file), figures))


def _kl(name: str, curve: list[dict]) -> float:
    """Of the best point; of the last one where so few tokens may do harm."""
    kl = [point["selection_kl_nats"] for point in curve]
    return kl[-1] if name.startswith("few") else min(kl)


if __name__ == "__main__":
    main()
