"""Coupled against decoupled BLD at equal predicted cost and equal tokens (Puzzle, table 6, in shape).

Decoupled: every variant on DECOUPLED + COUPLED tokens, one search. Two steps: every variant on DECOUPLED tokens, a
search, the pairs that its solutions use on COUPLED tokens, a second search. Both children are the search's first answer
within the same limit on the same cost table, assembled, not distilled, and measured on validation. Beside them the
second step's child with decoupled weights: what coupled training alone adds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from puzzle_nas import pipeline
from puzzle_nas.architecture import Architecture, choice_id
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.recipe import load_recipe
from puzzle_nas.scoring.comparison import ParentReference

DECOUPLED, COUPLED = 16384, 16384
"""Tokens for each variant, for each pair."""
SPEEDUP = 1.5


def searched(name: str, overrides: list[str], base: RunFolder) -> RunFolder:
    """A run up to its search, on the base run's text, costs and initialisation."""
    folder = RunFolder(Path("runs/benchmark-coupled") / name)
    if not folder.path.exists():
        ignored = shutil.ignore_patterns("child*", "baselines", "exports", "search", "scratch", "download")
        shutil.copytree(base.path, folder.path, ignore=ignored)
    unverified = [f"search.{name}" for name in ("verify=1", "removed_runs=0", "refine_rounds=0", "speed_attempts=0")]
    limits = f"search.limits={json.dumps({'speedup': SPEEDUP})}"
    recipe = load_recipe(Path("recipes/torch.yaml"), [limits, *unverified, *overrides])
    pipeline.run_stages(recipe, folder, last="search-architecture")
    return folder


def figures() -> dict[str, float]:
    """Three libraries' children, printed and returned."""
    base = RunFolder(Path("runs/torch"))
    settings = [f"bld.tokens={DECOUPLED}"]
    second = [f"coupled_bld.tokens={COUPLED}", "coupled_bld.batch_tokens=512", "coupled_bld.learning_rate=1.0e-3"]
    two_steps = searched("two-steps", settings + second, base)
    decoupled = searched("decoupled", [f"bld.tokens={DECOUPLED + COUPLED}"], base)
    parent = load_parent(pipeline.open_run(base), base)
    reference = ParentReference(parent, load_tokens(base, "validation"))

    def chosen(run: RunFolder) -> Architecture:
        return Architecture.from_list(read_json(run.architecture())["architecture"])

    children = {
        "decoupled": (decoupled, chosen(decoupled), "main"),
        "coupled": (two_steps, chosen(two_steps), "coupled"),
        "coupled_architecture_decoupled_weights": (decoupled, chosen(two_steps), "main"),
    }
    result: dict[str, float] = {"coupled_speedup_asked": SPEEDUP, "coupled_tokens": DECOUPLED + COUPLED}
    for name, (run, architecture, library) in children.items():
        kl = reference.compare(assemble(run, parent, architecture, library))
        result[f"validation_kl_nats_{name}"] = kl.kl_nats
        print(f"  {name:45s} KL {kl.kl_nats:.4f} +- {kl.kl_nats_standard_error:.4f} nats on validation")
    pairs = [choice_id(list(block.values())) for block in children["coupled"][1].layers]
    result["coupled_pairs_in_child"] = sum(
        two_steps.variant(layer, pair, "coupled").exists() for layer, pair in enumerate(pairs)
    )
    result["coupled_pairs_trained"] = sum(map(len, read_json(two_steps.coupled_pairs)["layers"]))
    for run, name in ((decoupled, "decoupled"), (two_steps, "coupled")):
        result[f"speedup_predicted_{name}"] = read_json(run.architecture())["speedup_predicted"]
    kl_of = {name: result[f"validation_kl_nats_{name}"] for name in children}
    result["coupled_kl_over_decoupled"] = kl_of["coupled"] / kl_of["decoupled"]
    result["coupled_kl_over_decoupled_same_architecture"] = (
        kl_of["coupled"] / kl_of["coupled_architecture_decoupled_weights"]
    )
    for name in ("coupled_kl_over_decoupled", "coupled_kl_over_decoupled_same_architecture"):
        print(f"  {name:45s} {result[name]:.4f}")
    return result
