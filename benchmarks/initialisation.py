"""Mean replace-1-block KL of each variant kind: the paper's initialisation, least squares, and BLD from each.

The last column trains with the paper's loss, normalised over the batch and not for each token (bld.normalise).
Runs the real pipeline five times on SmolLM2-135M-Instruct, on some layers to save time (LAYERS), with the
quickstart's text. python benchmarks/initialisation.py [BLD_TOKENS]
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

from results import save

from puzzle_nas import pipeline
from puzzle_nas.architecture import ParentShape
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.recipe import load_recipe, search_space_of

LAYERS = (2, 5, 11, 14, 17, 22, 28)
"""Spread over the depth, the two with massive activations, 11 and 28, among them."""


def run_one(base: Path, initialisation: str, bld_tokens: int, normalise: str = "token") -> dict[str, list[float]]:
    """KL by variant id, over LAYERS."""
    name = f"{initialisation}-{bld_tokens}-{normalise}"
    folder = RunFolder(Path("runs/benchmark-initialisation") / name)
    overrides = [
        f"library.initialisation={initialisation}",
        f"bld.tokens={bld_tokens}",
        f"bld.normalise={normalise}",
        "search_space.layers=" + json.dumps({i: [] for i in range(30) if i not in LAYERS}),
        "search_space.kv_heads=null",
        "search_space.width_fractions=[0.75, 0.5, 0.25, 0.1]",
        "scoring.batch_tokens=2048",
    ]
    recipe = load_recipe(Path("recipes/quickstart.yaml"), overrides)
    if not (folder / "data").exists() and base.exists():
        # The text is the same for all.
        for name in ("parent", "data", "parent.json", "stages/prepare_parent.json", "stages/prepare_data.json"):
            source, target = base / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    pipeline.claim_run(recipe, folder)
    for name in ("prepare-parent", "prepare-data", "build-library", "distill-blocks", "score-blocks"):
        pipeline.run_stage(pipeline.stage_named(name), recipe, folder)
    shape = ParentShape(**read_json(folder.parent)["shape"])
    scores: dict[str, list[float]] = {}
    for layer, slot, spec in search_space_of(recipe, shape):
        if layer in LAYERS and spec != shape.parent_spec(slot):
            value = read_json(folder.score(layer, spec.id))["kl_nats"]["mean"]
            scores.setdefault(spec.id, []).append(value)
    return scores


def main() -> None:
    """Print the table and keep the figures."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    base = Path("runs/quickstart")
    columns = {
        "paper": run_one(base, "paper", 0),
        "least_squares": run_one(base, "least_squares", 0),
        "paper_then_bld": run_one(base, "paper", tokens),
        "least_squares_then_bld": run_one(base, "least_squares", tokens),
        "same_by_batch": run_one(base, "least_squares", tokens, "batch"),
    }
    figures: dict[str, float] = {"bld_tokens": tokens, "layers": len(LAYERS)}
    print(f"{'mean KL, nats':18s}" + "".join(f"{name:>24s}" for name in columns))
    for variant in columns["paper"]:
        means = {name: statistics.mean(scores[variant]) for name, scores in columns.items()}
        medians = {name: statistics.median(scores[variant]) for name, scores in columns.items()}
        print(f"{variant:18s}" + "".join(f"{mean:24.4f}" for mean in means.values()))
        for name in columns:
            figures[f"mean_kl_nats.{variant}.{name}"] = round(means[name], 5)
            figures[f"median_kl_nats.{variant}.{name}"] = round(medians[name], 5)
    print("Written to", save("initialisation", figures))


if __name__ == "__main__":
    main()
