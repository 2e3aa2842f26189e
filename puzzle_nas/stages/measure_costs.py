"""What every variant costs: bytes exactly, runtime as measured on an engine. File: costs/ENGINE.json.

Runtimes come from whole models: stacks of one variant, and random mixtures. So each variant is timed among
neighbours, out of a cold cache, and not in a loop of its own. `cost_fit` says how they become costs of single variants.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import psutil
import torch

from puzzle_nas.architecture import Architecture, NoOpAttention, NoOpFFN, Scenario, Spec
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.cost_fit import fit, random_mixtures, uniform_models
from puzzle_nas.costs import CostTable
from puzzle_nas.engines import ENGINES, RequestTime, TorchEngine, interleaved_times
from puzzle_nas.errors import ArtifactError, RecipeError
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import free_bytes, machine_of, probe_model, shape_of
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.subblocks import variant_of

NAME = "measure_costs"
COMMAND = "measure-costs"
NEEDS = ("prepare_parent",)
SETTINGS = ("precision", "device", "threads", "engine", "search_space", "scenarios", "costs")
OUTPUTS = ("costs/*.json",)

BUSY_PERCENT = 20.0


def run(recipe: Recipe, run: RunFolder) -> None:
    """Measure, or take over the recipe's cost table; then see that the recipe's limits can be met at all."""
    if recipe.costs.file is not None:
        write_json(run.costs(recipe.engine), _given_table(recipe))
    else:
        write_json(run.costs(recipe.engine), _measured_table(recipe, run))
    for costs in CostTable.load_mixes(run, recipe):
        unscored = ArchitectureSearch.load_with(costs, recipe, run, scored=False)
        for scenario in costs.scenarios:
            predicted, measured = costs.request_ms(unscored.parent, scenario), costs.parent_measured_ms(scenario)
            console.print(
                f"  {scenario.name}: parent predicted {predicted:.0f} ms, measured whole {measured:.0f} ms, "
                f"predicted over measured {predicted / measured:.3f}"
            )
    limits = dict(recipe.search.limits)
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, limits, scored=False)
    found.solve(limits, recipe.search.gap, recipe.search.time_limit_seconds)


def _measured_table(recipe: Recipe, run: RunFolder) -> dict:
    parent, shape = load_parent(run)
    machine = machine_of(recipe)
    busy = psutil.cpu_percent(interval=0.5)
    if busy > BUSY_PERCENT:
        console.print(
            f"  Other work keeps this machine {busy:.0f} % busy: runtimes will be off. Better measure when it is idle."
        )
    specs = search_space_of(recipe, shape).kinds()
    specs += [spec for spec in (NoOpAttention(), NoOpFFN()) if spec not in specs]
    stacks = uniform_models(shape, specs)
    models = stacks | random_mixtures(shape, specs, recipe.costs.mixtures, recipe.seed)
    placeholders: dict[tuple, torch.Tensor] = {}
    others = {name: architecture for name, architecture in models.items() if name != "parent"}
    probes = {"parent": parent} | {name: probe_model(parent, a, placeholders) for name, a in others.items()}
    scenarios = _measurable(recipe, parent)
    engine = ENGINES[recipe.engine]
    with (
        engine.loaded(probes, run.scratch(NAME)) as loaded,
        progress(f"measure costs on {engine.name}, model", recipe.costs.repeats * len(probes)) as ticker,
    ):
        times = interleaved_times(
            list(probes),
            scenarios,
            lambda name, scenario: engine.time_parts(loaded[name], scenario, recipe.costs.decode_steps_measured),
            recipe.costs.repeats,
            ticker.advance,
            beside=None if engine.holds_all else "parent",
            on_more=ticker.extend,
        )
        whole = interleaved_times(["parent"], scenarios, lambda name, s: engine.time_request(loaded[name], s), 3)
    return {
        "machine": engine.describe(machine),
        "other_load_percent": busy,
        "load_average_1_min": os.getloadavg()[0],
        "num_hidden_layers": shape.num_hidden_layers,
        "bytes": _bytes(parent, {name: probes[name] for name in stacks}, specs),
        "scenarios": {
            name: {
                **_fitted(models, {model: times[model][name] for model in models}, scenario),
                "parent_measured": asdict(whole["parent"][name]),
                "working_bytes": TorchEngine().working_bytes(parent, scenario),
            }
            for name, scenario in scenarios.items()
        },
    }


def _measurable(recipe: Recipe, parent: PuzzleForCausalLM) -> dict[str, Scenario]:
    """By name, what the recipe names, and of its sweeps the batch sizes whose KV cache fits the free memory.

    Raises:
        RecipeError: of a sweep nothing fits.
    """
    free = free_bytes(parent.device)
    own = shape_of(parent.config).parent_spec("attention")
    per_token = variant_of(own).kv_bytes_per_token(own, parent.config, parent.dtype.itemsize)
    token_bytes = per_token * parent.config.num_hidden_layers
    named = {s.name for s in recipe.scenarios}
    fitting = {
        s.name: s for s in recipe.traffic() if s.name in named or s.batch_size * s.total_tokens * token_bytes < free / 2
    }
    for scenario in recipe.traffic():
        if scenario.name not in fitting:
            console.print(f"  {scenario.name}: its KV cache would take more than half of the free memory; left out.")
    if not any(all(s.name in fitting for s in mix) for mix in recipe.mixes()):
        raise RecipeError("Not even one request of a swept scenario fits this machine's memory; shorten it.")
    return fitting


def _fitted(models: Mapping[str, Architecture], times: Mapping[str, RequestTime], scenario: Scenario) -> dict[str, Any]:
    """The additive costs of one scenario, and how far off they are on models that the fit has not seen."""
    parts = {
        "prefill_ms": fit(models, {name: time.prefill_ms for name, time in times.items()}),
        "decode_step_ms": fit(models, {name: time.decode_step_ms for name, time in times.items()}),
    }
    whole = fit(models, {name: time.total_ms(scenario) for name, time in times.items()})
    return {
        "fixed": {part: found.fixed for part, found in parts.items()},
        "variants": {
            variant: {part: found.variants[variant] for part, found in parts.items()}
            for variant in parts["prefill_ms"].variants
        },
        "prediction_error_median": statistics.median(abs(error) for error in whole.relative_errors.values()),
    }


def _given_table(recipe: Recipe) -> dict:
    path = recipe.costs.file
    assert path is not None
    if not path.is_file():
        raise ArtifactError(f"There is no cost table {path}; leave out costs.file to measure one.")
    table = read_json(path)
    lacking = {"machine", "bytes", "scenarios"} - set(table)
    lacking |= {s.name for s in recipe.traffic()} - set(table.get("scenarios", {}))
    if lacking:
        missing = ", ".join(sorted(lacking))
        raise ArtifactError(f"The cost table {path} lacks {missing}; leave out costs.file to measure one.")
    if recipe.costs.force:
        return table
    here = ENGINES[recipe.engine].describe(machine_of(recipe))
    differing = [name for name, value in here.items() if table["machine"].get(name) != value]
    if differing:
        differences = "; ".join(f"{name} {table['machine'].get(name)}, here {here[name]}" for name in differing)
        raise ArtifactError(
            f"The cost table {path} belongs to another place ({differences}); leave out costs.file to measure one, "
            "or set costs.force=true to search for that place."
        )
    return table


def _bytes(parent: PuzzleForCausalLM, probes: dict[str, PuzzleForCausalLM], specs: list[Spec]) -> dict:
    """Counted on real tensors: tied embeddings once, biases and norms included."""
    itemsize = parent.dtype.itemsize
    variants = {}
    for spec in specs:
        owner = probes.get(spec.id, parent)
        prefixes = (
            ("self_attn.", "input_layernorm.") if spec.slot == "attention" else ("mlp.", "post_attention_layernorm.")
        )
        count = sum(w.numel() for name, w in owner.model.layers[0].named_parameters() if name.startswith(prefixes))
        variants[spec.id] = {
            "parameters": count,
            "parameter_bytes": count * itemsize,
            "kv_bytes_per_token": variant_of(spec).kv_bytes_per_token(spec, parent.config, itemsize),
        }
    fixed = sum(w.numel() for name, w in parent.named_parameters() if not name.startswith("model.layers."))
    return {"fixed": {"parameters": fixed, "parameter_bytes": fixed * itemsize}, "variants": variants}
