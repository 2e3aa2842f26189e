"""How far predicted time is from measured time: random architectures of SmolLM2-135M-Instruct, three scenarios, on an
engine (torch, where none is named).

Costs of single variants come from timed models in two ways: sums of stacks (the time of thirty like sub-blocks less
that of none, by thirty) and the fit that the product uses (cost_fit). Both then predict architectures that neither has
seen, whole requests of which are timed. Reads runs/quickstart. python benchmarks/costs.py [ARCHITECTURES [ENGINE]]
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from results import RESULTS, save

from puzzle_nas.architecture import Architecture, NoOpAttention, NoOpFFN, Scenario
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.cost_fit import EMPTY, fit, random_mixtures, uniform_models
from puzzle_nas.engines import ENGINES, interleaved_times
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import probe_model
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import search_space_of

SCENARIOS = [
    Scenario("1x128+32", 1, 128, 32),
    Scenario("8x128+32", 8, 128, 32),
    Scenario("1x512+32", 1, 512, 32),
]
FITTED_ON = 24
REPEATS = 3
DECODE_STEPS = 8


def sums_of_stacks(shape, stacks: dict[str, Architecture], times: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Fixed part and cost of each variant id, by subtraction."""
    costs: dict[str, float] = {}
    for name, architecture in stacks.items():
        for slot, spec in architecture.layers[0].items():
            if name in ("parent", spec.id):
                without = times[(NoOpAttention() if slot == "attention" else NoOpFFN()).id]
                costs[spec.id] = max(0.0, times[name] - without) / shape.num_hidden_layers
    return times[EMPTY], costs


def predicted(architecture: Architecture, fixed: float, costs: dict[str, float]) -> float:
    """Sum over the architecture."""
    return fixed + sum(costs[spec.id] for _, _, spec in architecture)


def percentile_95(values: list[float]) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


@torch.inference_mode()
def main() -> None:
    """Print the errors by scenario, keep them, and draw predicted against measured."""
    run = RunFolder(Path("runs/quickstart"))
    parent, shape = load_parent(run)
    recipe = open_run(run)
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    specs = search_space_of(recipe, shape).kinds()
    specs += [s for s in (NoOpAttention(), NoOpFFN()) if s not in specs]
    stacks = uniform_models(shape, specs)
    fitted = stacks | random_mixtures(shape, specs, FITTED_ON, seed=1)
    drawn = random_mixtures(shape, specs, int(sys.argv[1]) if len(sys.argv) > 1 else 20, seed=2)
    unseen = {f"unseen {name}": architecture for name, architecture in drawn.items()}
    placeholders: dict = {}
    probes = {"parent": parent}
    for name, architecture in (fitted | unseen).items():
        probes.setdefault(name, probe_model(parent, architecture, placeholders))
    engine = ENGINES[sys.argv[2] if len(sys.argv) > 2 else "torch"]
    beside = None if engine.holds_all else "parent"
    scenarios = {s.name: s for s in SCENARIOS}

    def progress() -> None:
        print(".", end="", flush=True)

    with engine.loaded(probes, Path("runs/benchmark-costs")) as loaded:
        parts = interleaved_times(
            ["parent", *(name for name in fitted if name != "parent")],
            scenarios,
            lambda n, s: engine.time_parts(loaded[n], s, DECODE_STEPS),
            REPEATS,
            progress,
            beside,
        )
        whole = interleaved_times(
            list(unseen), scenarios, lambda n, s: engine.time_request(loaded[n], s), REPEATS, progress, beside
        )
    figures: dict[str, float] = {"architectures": len(unseen), "fitted_on": len(fitted)}
    _, axes = plt.subplots(1, len(SCENARIOS), figsize=(12, 4))
    every: dict[str, list[float]] = {"sums_of_stacks": [], "fit": []}
    print(f"\n{'scenario':10s}{'':16s}{'median':>8s}{'p95':>8s}{'bias':>8s}   of {len(unseen)} unseen architectures")
    for axis, s in zip(axes, SCENARIOS, strict=True):
        times = {name: parts[name][s.name].total_ms(s) for name in fitted}
        found = fit(fitted, times)
        models = {"sums_of_stacks": sums_of_stacks(shape, stacks, times), "fit": (found.fixed, found.variants)}
        measured = {name: whole[name][s.name].total_ms(s) for name in unseen}
        for way, (fixed, costs) in models.items():
            guess = {name: predicted(a, fixed, costs) for name, a in unseen.items()}
            errors = [guess[name] / measured[name] - 1 for name in unseen]
            every[way] += errors
            sizes = [abs(e) for e in errors]
            row = statistics.median(sizes), percentile_95(sizes), statistics.mean(errors)
            for figure, value in zip(("median", "p95", "mean_signed"), row, strict=True):
                figures[f"prediction_error_{figure}.{s.name}.{way}"] = round(value, 4)
            print(f"{s.name:10s}{way:16s}" + "".join(f"{100 * v:7.1f}%" for v in row))
            axis.scatter([measured[n] for n in unseen], [guess[n] for n in unseen], s=14, label=way.replace("_", " "))
        ends = [min(measured.values()), max(measured.values())]
        axis.plot(ends, ends, color="grey", linewidth=1)
        axis.set(title=s.name, xlabel="measured, ms", ylabel="predicted, ms")
    for way, errors in every.items():
        sizes = [abs(e) for e in errors]
        suffix = "" if way == "fit" else f".{way}"
        figures[f"prediction_error_median{suffix}"] = round(statistics.median(sizes), 4)
        figures[f"prediction_error_p95{suffix}"] = round(percentile_95(sizes), 4)
    axes[0].legend()
    plt.tight_layout()
    name = "costs" if engine.name == "torch" else f"costs-{engine.name}"
    picture = RESULTS / f"{name}.png"
    plt.savefig(picture, dpi=100)
    print("Written to", save(name, figures), "and", picture)


if __name__ == "__main__":
    main()
