"""What every variant costs: bytes exactly, runtime as measured on an engine. File: costs/ENGINE.json.

Runtimes come from whole models: stacks of one variant, and random mixtures. So each variant is timed among
neighbours, out of a cold cache, and not in a loop of its own. `cost_fit` says how they become costs of single variants.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil
import torch
from transformers import AutoConfig, PreTrainedModel

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.cost_fit import PARENT, Part, fit, parts_of, random_mixtures, uniform_models
from puzzle_nas.choosing.costs import REPEATS, CostTable, group_name, timed_steps
from puzzle_nas.engines import ENGINES, Engine, RequestTime, TorchEngine, interleaved_times
from puzzle_nas.errors import ArtifactError, RecipeError
from puzzle_nas.families import Anatomy, architecture_of, head_dim_of, load_parent, parent_checkpoint, probe_model
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.machine import free_bytes, machine_of
from puzzle_nas.planning.refusals import check_lengths
from puzzle_nas.planning.shapes import part_weights
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.scenario import Scenario
from puzzle_nas.servable import SERVERS, removes_whole_layers
from puzzle_nas.specs import Head, Spec

NAME = __name__.rpartition(".")[2]

BUSY_PERCENT = 20.0
TRUSTED = 0.15
"""How far the sum of the variants' times may be from that of the whole parent."""


def run(recipe: Recipe, run: RunFolder) -> None:
    """Measure, or take over the recipe's cost table; then see that the recipe's limits can be met at all."""
    check_lengths(recipe, AutoConfig.from_pretrained(parent_checkpoint(run)))
    if recipe.costs.file is not None:
        write_json(run.costs(recipe.engine), _given_table(recipe))
    else:
        write_json(run.costs(recipe.engine), _measured_table(recipe, run))
    for costs in CostTable.load_mixes(run, recipe):
        unscored = ArchitectureSearch.load_with(costs, recipe, run, scored=False)
        for scenario in costs.scenarios:
            predicted, measured = costs.request_ms(unscored.parent, scenario), costs.parent_measured_ms(scenario)
            ratio = predicted / measured
            console.print(
                f"  {scenario.name}: parent predicted {predicted:.0f} ms, measured whole {measured:.0f} ms, "
                f"predicted over measured {ratio:.3f}"
            )
            if abs(ratio - 1) > TRUSTED:
                console.print(
                    "  Do not rely on predicted speed-ups: either this machine was busy (puzzle measure-costs RUN "
                    "--again), or the parent is so small that its layers hardly count."
                )
    limits = dict(recipe.search.limits)
    found = ArchitectureSearch.at_best_batch_sizes(recipe, run, limits, scored=False)
    found.solve(limits)


def _measured_table(recipe: Recipe, run: RunFolder) -> dict:
    parent = load_parent(recipe, run)
    machine = machine_of(recipe)
    busy = psutil.cpu_percent(interval=0.5)
    if busy > BUSY_PERCENT:
        console.print(
            f"  Other work keeps this machine {busy:.0f} % busy: runtimes will be off. Better measure when it is idle."
        )
    space = search_space_of(recipe, architecture_of(parent.config))
    weights = {part: part_weights(parent, part) for part in parts_of(space)}
    engine, steps = ENGINES[recipe.engine], timed_steps(recipe.engine)
    itemsize = engine.weights_dtype(parent.dtype).itemsize
    kv_itemsize = itemsize if recipe.kv_format is None else SERVERS[recipe.engine].kv_formats[recipe.kv_format]
    counted_bytes = _bytes(parent, weights, engine, itemsize, kv_itemsize)
    sizes = {part: sum(w.numel() for w in tensors.values() if w.ndim > 1) for part, tensors in weights.items()}
    whole_layers = removes_whole_layers(recipe.engine, parent.config.model_type)
    models = uniform_models(space, whole_layers)
    models |= random_mixtures(space, recipe.costs.mixtures, recipe.seed, whole_layers)
    placeholders: dict[tuple, torch.Tensor] = {}
    others = {name: architecture for name, architecture in models.items() if name != PARENT}
    probes = {PARENT: parent} | {name: probe_model(parent, a, placeholders) for name, a in others.items()}
    scenarios = _measurable(recipe, parent, kv_itemsize)
    beside, repeats = (None, REPEATS) if engine.holds(probes) else (PARENT, REPEATS - 1)
    with (
        engine.loaded(probes, run.scratch(NAME), recipe.kv_format) as loaded,
        progress(f"measure costs on {engine.name}, model", repeats * len(probes)) as ticker,
    ):
        times = interleaved_times(
            list(probes),
            scenarios,
            lambda name, scenario: engine.time_parts(loaded[name], scenario, steps),
            repeats,
            ticker.advance,
            beside=beside,
            on_more=ticker.extend,
        )
        whole = interleaved_times([PARENT], scenarios, lambda name, s: engine.time_request(loaded[name], s), 3)
    return {
        "machine": engine.describe(machine),
        "other_load_percent": busy,
        "load_average_1_min": os.getloadavg()[0],
        "groups": list(space.parent.groups),
        "bytes": counted_bytes,
        "scenarios": {
            name: {
                **_fitted(models, {model: times[model][name] for model in models}, scenario, sizes),
                "parent_measured": asdict(whole[PARENT][name]),
                "working_bytes": TorchEngine().working_bytes(parent, scenario),
            }
            for name, scenario in scenarios.items()
        },
    }


def _measurable(recipe: Recipe, parent: PreTrainedModel, itemsize: float) -> dict[str, Scenario]:
    """By name, what the recipe names, and of its several batch sizes those whose KV cache fits the free memory.

    Args:
        itemsize: bytes of a number in the cache.

    Raises:
        RecipeError: no batch size fits.
    """
    free = free_bytes(parent.device)
    head_dim = head_dim_of(parent.config)

    def cache_bytes(scenario: Scenario) -> int:
        own = architecture_of(parent.config)
        one = sum(spec.cache_bytes(scenario.total_tokens, head_dim, itemsize) for _, _, spec in own)
        return scenario.batch_size * one

    named = {s.name for s in recipe.scenarios}
    fitting = {s.name: s for s in recipe.traffic() if s.name in named or cache_bytes(s) < free / 2}
    for scenario in recipe.traffic():
        if scenario.name not in fitting:
            console.print(f"  {scenario.name}: its KV cache would take more than half of the free memory; left out.")
    if not any(all(s.name in fitting for s in mix) for mix in recipe.mixes()):
        raise RecipeError(
            "None of a scenario's batch sizes fits this machine's memory; add smaller ones, or shorten its requests."
        )
    return fitting


def _fitted(
    models: Mapping[str, Architecture],
    times: Mapping[str, RequestTime],
    scenario: Scenario,
    sizes: Mapping[Part, int],
) -> dict[str, Any]:
    """The additive costs of one scenario, and how far off they are on models that the fit has not seen."""
    times_ms = {
        "prefill_ms": fit(models, {name: time.prefill_ms for name, time in times.items()}, sizes),
        "decode_step_ms": fit(models, {name: time.decode_step_ms for name, time in times.items()}, sizes),
    }
    whole = fit(models, {name: time.total_ms(scenario) for name, time in times.items()}, sizes)
    groups = models[PARENT].groups
    return {
        "fixed": {time: found.fixed for time, found in times_ms.items()},
        "variants": by_group(
            {part: {time: found.parts[part] for time, found in times_ms.items()} for part in sizes}, groups
        ),
        "measured": {
            model: {**asdict(time), "prediction_error": whole.relative_errors.get(model)}
            for model, time in times.items()
        },
        "prediction_error_median": statistics.median(abs(error) for error in whole.relative_errors.values()),
    }


def _given_table(recipe: Recipe) -> dict:
    path = recipe.costs.file
    assert path is not None
    if not path.is_file():
        raise ArtifactError(f"There is no cost table {path}; leave out costs.file to measure one.")
    table = read_json(path)
    lacking = {"machine", "groups", "bytes", "scenarios"} - set(table)
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


def by_group(values: Mapping[Part, Any], groups: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Values of variants as cost tables hold them: by the name of their group, then by id."""
    result: dict[str, dict[str, Any]] = {}
    for part, value in values.items():
        result.setdefault(group_name(part.group, groups), {})[part.spec.id] = value
    return result


def _bytes(
    parent: PreTrainedModel,
    weights: Mapping[Part, Mapping[str, torch.Tensor]],
    engine: Engine,
    itemsize: int,
    kv_itemsize: float,
) -> dict[str, Any]:
    """Counted on real shapes: tied embeddings once, biases and norms included; matrices as their formats store them.

    Args:
        engine: whose files are counted.
        itemsize: bytes of a number without a format.
        kv_itemsize: of one in the KV cache.

    Raises:
        FormatError: a format does not hold a matrix; the message names both.
    """
    variants = {}
    for part, tensors in weights.items():
        has_state = not part.spec.empty and not isinstance(part.spec, Head)
        family = Anatomy(parent).family
        variants[part] = {
            "parameters": sum(w.numel() for w in tensors.values()),
            "parameter_bytes": sum(_stored_bytes(name, w, part.spec, engine, itemsize) for name, w in tensors.items())
            + (0 if isinstance(part.spec, Head) else engine.filler_bytes(part.spec, parent.config)),
            "state_bytes": family.state_bytes(parent.config, part.spec.slot, itemsize) if has_state else 0,
        }
    parts = Anatomy(parent)
    ends = (parts.head.weight, parts.embeddings.weight)
    outside = [w for name, w in parent.named_parameters() if not name.startswith(parts.layer_prefix)]
    fixed = sum(w.numel() for w in outside if all(w is not end for end in ends))
    return {
        "head_dim": head_dim_of(parent.config),
        "cache_itemsize": kv_itemsize,
        "fixed": {"parameters": fixed, "parameter_bytes": fixed * (engine.vector_itemsize or itemsize)},
        "variants": by_group(variants, architecture_of(parent.config).groups),
    }


def _stored_bytes(name: str, weight: torch.Tensor, spec: Spec, engine: Engine, itemsize: int) -> int:
    if weight.ndim == 1:
        return weight.numel() * (engine.vector_itemsize or itemsize)
    if spec.format is None:
        return weight.numel() * itemsize
    rows, columns = weight.shape
    return layout_of(spec.format).bytes_of(rows, columns, f"{name} of {spec.id}")
