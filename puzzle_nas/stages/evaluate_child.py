"""Child against parent, side by side: KL, perplexity and agreement on the validation split, and measured speed.

Files: evaluation.json (figures of quality, reproducible) and measured.json (times).
"""

from __future__ import annotations

import statistics

from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES, interleaved_times, relative_standard_error
from puzzle_nas.families import load_model, load_parent
from puzzle_nas.machine import OtherLoad, machine_of
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.comparison import BATCH_TOKENS, ParentReference
from puzzle_nas.scoring.replacement import ReplacementWalk, rounding_counts

NAME = __name__.rpartition(".")[2]


def run(recipe: Recipe, run: RunFolder) -> None:
    """Measure everything that is reported."""
    parent = load_parent(recipe, run)
    machine = machine_of(recipe)
    tokens = load_tokens(run, "validation")
    children = {"assembled": run / "child", "refitted": run / "child-refit", "distilled": run / "child-gkd"}
    children = {name: path for name, path in children.items() if path.exists()}
    search = read_json(run.architecture(), "search-architecture")
    baselines = {
        name: run / "baselines" / name for name, found in search["baselines"].items() if "architecture" in found
    }
    reference = ParentReference(parent, tokens)
    result = {"parent": reference.compare(parent).to_dict(), "child": {}, "baselines": {}}
    compared: dict[str, dict] = {}
    with progress("evaluate, model", len(children) + len(baselines)) as ticker:
        for group, paths in (("child", children), ("baselines", baselines)):
            for name, path in paths.items():
                # Baselines may be the same model.
                model = fingerprint(search["baselines"][name]["architecture"]) if group == "baselines" else name
                if model not in compared:
                    compared[model] = reference.compare(load_model(path, machine)).to_dict()
                result[group][name] = compared[model]
                ticker.advance()
    if rounding_counts(parent):
        walk = ReplacementWalk(parent, tokens, BATCH_TOKENS)
        (rounding,) = walk.try_variants(walk.rounded_otherwise())
        result["kl_nats_of_rounding"] = float(rounding.kl_nats.double().mean())
    write_json(run / "evaluation.json", result)
    measured = _measure_speed(recipe, run, parent, load_model(run / "child-gkd", machine))
    measured["quantised_parents"] = {
        name: _measure_speed(recipe, run, parent, load_model(path, machine))
        for name, path in baselines.items()
        if name.startswith("parent@")
    }
    write_json(run / "measured.json", measured)


def _measure_speed(recipe: Recipe, run: RunFolder, parent, child) -> dict:
    models = {"parent": parent, "child": child}
    engine, costs = ENGINES[recipe.engine], CostTable.load(run, recipe)
    scenarios = {s.name: s for s in costs.scenarios}
    totals: dict[str, list[float]] = {"parent": [], "child": []}

    def measure(name, scenario):
        measured = engine.time_request(loaded[name], scenario)
        totals[name].append(scenario.weight * measured.total_ms(scenario))
        return measured

    with (
        engine.loaded(models, run.scratch(NAME)) as loaded,
        OtherLoad() as other_load,
        progress(f"measure speed on {engine.name}, model", recipe.evaluation.timing_repeats * len(models)) as ticker,
    ):
        times = interleaved_times(
            list(models),
            scenarios,
            measure,
            recipe.evaluation.timing_repeats,
            ticker.advance,
            on_more=ticker.extend,
        )
    count = len(scenarios)
    ratios = sorted(
        sum(totals["parent"][i : i + count]) / sum(totals["child"][i : i + count])
        for i in range(0, len(totals["parent"]), count)
    )
    median = statistics.median(ratios)
    mix_ms = {
        model: sum(s.weight * times[model][name].total_ms(s) for name, s in scenarios.items()) for model in models
    }
    # Repeats that agree may all be wrong: what the fastest of them say instead is within the error as well.
    error = max(median * relative_standard_error(ratios), abs(median - mix_ms["parent"] / mix_ms["child"]))
    return {
        "scenarios": {
            name: {model: vars(times[model][name]) | {"request_ms": times[model][name].total_ms(s)} for model in models}
            for name, s in scenarios.items()
        },
        "mix_ms": mix_ms,
        "speedup": median,
        "speedup_standard_error": error,
        "speedup_by_repeat": ratios,
        "other_load_percent": other_load.percent,
    }
