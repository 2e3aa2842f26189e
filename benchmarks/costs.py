"""How far predicted time is from measured time: random architectures of SmolLM2-135M-Instruct, three scenarios, on an
engine (torch, where none is named).

Costs of single variants come from timed models in two ways: sums of stacks (the time of thirty like sub-blocks less
that of none, by thirty) and the fit that the product uses (cost_fit). Both then predict architectures that neither has
seen, whole requests of which are timed. Reads runs/torch. python benchmarks/costs.py [ARCHITECTURES [ENGINE]]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from results import RESULTS, save

from puzzle_nas.architecture import Architecture, NoOp, Scenario, SearchSpace
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.cost_fit import EMPTY, PARENT, Part, fit, parts_of, random_mixtures, stack_name, uniform_models
from puzzle_nas.engines import ENGINES, interleaved_times
from puzzle_nas.families import architecture_of, load_parent, probe_model
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


def sums_of_stacks(space: SearchSpace, times: Mapping[str, float]) -> tuple[float, dict[Part, float]]:
    """Fixed part and cost of each variant of a group of layers, by subtraction."""
    parent = space.parent
    costs: dict[Part, float] = {}
    for part in parts_of(space):
        is_own = part.spec == parent.layers[part.group][part.spec.slot]
        without = times[stack_name(Part(part.group, NoOp(part.spec.slot)))]
        whole = times[PARENT if is_own else stack_name(part)]
        costs[part] = max(0.0, whole - without) / parent.groups.count(part.group)
    return times[EMPTY], costs


def predicted(architecture: Architecture, groups: Sequence[int], fixed: float, costs: Mapping[Part, float]) -> float:
    """Sum over the architecture."""
    return fixed + sum(costs[Part(groups[layer], spec)] for layer, _, spec in architecture)


def percentile_95(values: list[float]) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


@torch.inference_mode()
def main() -> None:
    """Print the errors by scenario, keep them, and draw predicted against measured."""
    run = RunFolder(Path("runs/torch"))
    recipe = open_run(run)
    parent = load_parent(recipe, run)
    space = search_space_of(recipe, architecture_of(parent.config))
    groups = space.parent.groups
    fitted = uniform_models(space) | random_mixtures(space, FITTED_ON, seed=1)
    drawn = random_mixtures(space, int(sys.argv[1]) if len(sys.argv) > 1 else 20, seed=2)
    unseen = {f"unseen {name}": architecture for name, architecture in drawn.items()}
    placeholders: dict = {}
    probes = {PARENT: parent}
    for name, architecture in (fitted | unseen).items():
        probes.setdefault(name, probe_model(parent, architecture, placeholders))
    engine = ENGINES[sys.argv[2] if len(sys.argv) > 2 else "torch"]
    beside = None if engine.holds_all else PARENT
    scenarios = {s.name: s for s in SCENARIOS}

    def progress() -> None:
        print(".", end="", flush=True)

    with engine.loaded(probes, Path("runs/benchmark-costs")) as loaded:
        parts = interleaved_times(
            [PARENT, *(name for name in fitted if name != PARENT)],
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
        models = {"sums_of_stacks": sums_of_stacks(space, times), "fit": (found.fixed, found.parts)}
        measured = {name: whole[name][s.name].total_ms(s) for name in unseen}
        for way, (fixed, costs) in models.items():
            guess = {name: predicted(a, groups, fixed, costs) for name, a in unseen.items()}
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
