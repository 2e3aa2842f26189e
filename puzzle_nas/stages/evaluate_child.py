"""Child against parent, side by side: KL, perplexity and agreement on the validation split, and measured speed.

Files: evaluation.json (figures of quality, reproducible) and measured.json (times).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from transformers import PreTrainedModel

from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES, RequestTime, interleaved_times, relative_standard_error
from puzzle_nas.families import load_model, load_parent
from puzzle_nas.machine import OtherLoad, machine_of
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.scenario import Scenario
from puzzle_nas.scoring.comparison import BATCH_TOKENS, ParentReference
from puzzle_nas.scoring.replacement import ReplacementWalk, rounding_counts

NAME = __name__.rpartition(".")[2]
TIMING_REPEATS = 5
"""Interleaved whole request batches of parent and child, of which the median counts; three times as many at most while
they differ too much (`interleaved_times`)."""


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
    if recipe.kv_format is not None:
        console.print(
            f"  KL is without what a KV cache in {recipe.kv_format} rounds; `puzzle evaluate EXPORT` has it in."
        )
    children = {"child": run / "child-gkd"} | {n: path for n, path in baselines.items() if n.startswith("parent@")}
    measured = _measure_speeds(recipe, run, parent, {n: load_model(path, machine) for n, path in children.items()})
    child = measured.pop("child")
    write_json(run / "measured.json", {**child, "quantised_parents": measured})


def _measure_speeds(
    recipe: Recipe, run: RunFolder, parent: PreTrainedModel, children: Mapping[str, PreTrainedModel]
) -> dict[str, dict]:
    """Times next to the parent: every repeat times all models where the engine holds them at once, else a pair."""
    engine, every = ENGINES[recipe.engine], {"parent": parent, **children}
    groups = [every] if engine.holds(every) else [{"parent": parent, name: child} for name, child in children.items()]
    costs = CostTable.load(run, recipe)
    scenarios = {s.name: s for s in costs.scenarios}
    measured: dict[str, dict] = {}
    with progress(f"measure speed on {engine.name}, model", TIMING_REPEATS * sum(map(len, groups))) as ticker:
        for models in groups:
            totals: dict[str, list[float]] = {name: [] for name in models}
            with engine.loaded(models, run.scratch(NAME), recipe.kv_format) as loaded, OtherLoad() as other_load:

                def measure(name, scenario, loaded=loaded, totals=totals):
                    time = engine.time_request(loaded[name], scenario)
                    totals[name].append(scenario.weight * time.total_ms(scenario))
                    return time

                times = interleaved_times(
                    list(models), scenarios, measure, TIMING_REPEATS, ticker.advance, on_more=ticker.extend
                )
            for name in list(models)[1:]:
                pair = {"parent": times["parent"], "child": times[name]}
                found = _compared(scenarios, pair, {"parent": totals["parent"], "child": totals[name]})
                measured[name] = found | {"other_load_percent": other_load.percent}
    return measured


def _compared(
    scenarios: Mapping[str, Scenario],
    times: Mapping[str, Mapping[str, RequestTime]],
    totals: Mapping[str, list[float]],
) -> dict:
    """Times of `parent` and `child`, and how much faster the child is.

    Args:
        totals: weighted milliseconds of each scenario in turn, in each repeat.
    """
    count = len(scenarios)
    ratios = sorted(
        sum(totals["parent"][i : i + count]) / sum(totals["child"][i : i + count])
        for i in range(0, len(totals["parent"]), count)
    )
    median = statistics.median(ratios)
    mix_ms = {
        model: sum(s.weight * time[name].total_ms(s) for name, s in scenarios.items()) for model, time in times.items()
    }
    # Repeats that agree may all be wrong: what the fastest of them say instead is within the error as well.
    error = max(median * relative_standard_error(ratios), abs(median - mix_ms["parent"] / mix_ms["child"]))
    return {
        "scenarios": {
            name: {model: vars(time[name]) | {"request_ms": time[name].total_ms(s)} for model, time in times.items()}
            for name, s in scenarios.items()
        },
        "mix_ms": mix_ms,
        "speedup": median,
        "speedup_standard_error": error,
        "speedup_by_repeat": ratios,
    }
