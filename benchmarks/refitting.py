"""What the closed-form correction (refit) is worth, and whether it tells before GKD which child is best after it.

Children before GKD of benchmarks/alternatives.py general, KL on the selection split. First how strongly it should be
pulled towards the present weights, by how many tokens it has; then for all children KL as assembled, refitted,
and after GKD on as many tokens each, with rank correlations: python benchmarks/refitting.py
"""

from __future__ import annotations

import os
import time

import torch
from alternative_starts import SPEEDUPS, Place
from alternatives import OWN_TOKENS
from results import save
from scores import spearman

from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.pipeline import open_run
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.refinement import REFIT_TOKENS
from puzzle_nas.training.refitting import refit

RIDGES = (256, 1_536, 6_144, 24_576)
SHOWN = ("1.25x/contiguous", "1.5x/greedy")


def main() -> None:
    """Print both tables and keep them."""
    place = Place(RunFolder("runs/general"))
    recipe, (parent, _) = open_run(place.base), load_parent(place.base)
    torch.set_num_threads(recipe.threads or len(os.sched_getaffinity(0)))
    calibration, selection = (load_tokens(place.base, split) for split in ("calibration", "selection"))
    reference = ParentReference(parent, selection)
    figures: dict[str, float] = {}

    def refitted_kl(name: str, tokens: int, ridge_tokens: float) -> float:
        child = PuzzleForCausalLM.from_pretrained(place.folder / name / "start", dtype=parent.dtype).eval()
        refit(parent, child, calibration[: tokens // calibration.shape[1]], ridge_tokens)
        return reference.compare(child).kl_nats

    every = calibration.numel()
    print(f"{'child':22s}{'tokens':>8s}" + "".join(f"{f'ridge {r}':>13s}" for r in RIDGES))
    for name in SHOWN:
        for tokens in (REFIT_TOKENS, every):
            kl = [refitted_kl(name, tokens, ridge) for ridge in RIDGES]
            figures |= {f"kl_{name}_tokens_{tokens}_ridge_{r}": round(k, 4) for r, k in zip(RIDGES, kl, strict=True)}
            print(f"{name:22s}{tokens:8d}" + "".join(f"{k:13.4f}" for k in kl), flush=True)

    rows = []
    steps = OWN_TOKENS // recipe.gkd.batch_tokens
    print(f"\n{'child':22s}{'assembled':>11s}{'refitted':>10s}{'after GKD':>11s}{'refit s':>9s}")
    for speedup in sorted(SPEEDUPS):
        for path in sorted((place.folder / f"{speedup}x").glob("*/result.json")):
            name, result = f"{speedup}x/{path.parent.name}", read_json(path)
            if path.parent.name == "puzzle":
                continue  # It starts refitted.
            begin = time.monotonic()
            refitted = refitted_kl(name, every, recipe.refit.ridge_tokens)
            seconds = time.monotonic() - begin
            at = {point["step"]: point["selection_kl_nats"] for point in result["curve"]}
            rows.append((at[0], refitted, at[steps]))
            print(f"{name:22s}{at[0]:11.4f}{refitted:10.4f}{at[steps]:11.4f}{seconds:9.1f}", flush=True)
            for what, value in zip(("assembled", "refitted", "after_gkd"), rows[-1], strict=True):
                figures[f"kl_{what}_{name}"] = round(value, 4)
    before, refitted, after = map(list, zip(*rows, strict=True))
    for what, kl in (("assembled", before), ("refitted", refitted), ("better", [*map(min, before, refitted)])):
        figures[f"spearman_{what}_vs_after_gkd"] = spearman(kl, after)
        print(f"rank correlation with KL after GKD: {what} {figures[f'spearman_{what}_vs_after_gkd']:.3f}")
    figures["gkd_tokens"] = steps * recipe.gkd.batch_tokens
    print("Written to", save("refitting", figures))


if __name__ == "__main__":
    main()
