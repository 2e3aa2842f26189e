"""What every variant costs: bytes exactly, runtime as measured on an engine. File: costs/ENGINE.json.

Runtimes come from whole models in which every layer has the same variant in one slot and the parent's in the other,
less the model that has nothing in that slot. So each variant is timed among its neighbours, out of a cold cache, and
not in a loop of its own. Embeddings, final norm and LM head are the model without any sub-block.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from puzzle_nas.architecture import SLOTS, Architecture, NoOpAttention, NoOpFFN, ParentShape, Spec
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.engines import RequestTime, TorchEngine
from puzzle_nas.engines.torch_engine import interleaved_medians
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import load_parent
from puzzle_nas.families.loading import describe, machine_of, probe_model
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.subblocks import variant_of

NAME = "measure_costs"
COMMAND = "measure-costs"
NEEDS = ("prepare_parent",)
SETTINGS = ("precision", "device", "threads", "search_space", "scenarios", "costs")
OUTPUTS = ("costs/torch.json",)

BUSY_PERCENT = 20.0


def run(recipe: Recipe, run: RunFolder) -> None:
    """Measure, or take over the recipe's cost table; then see that the recipe's limits can be met at all."""
    if recipe.costs.file is not None:
        write_json(run.costs("torch"), _given_table(recipe, recipe.costs.file))
    else:
        write_json(run.costs("torch"), _measured_table(recipe, run))
    unscored = ArchitectureSearch.load(recipe, run, scored=False)
    for scenario in unscored.costs.scenarios:
        predicted = unscored.costs.request_ms(unscored.parent, scenario)
        measured = unscored.costs.parent_measured_ms(scenario)
        console.print(
            f"  {scenario.name}: parent predicted {predicted:.0f} ms, measured whole {measured:.0f} ms, "
            f"predicted over measured {predicted / measured:.3f}"
        )
    unscored.solve(dict(recipe.search.limits), recipe.search.gap, recipe.search.time_limit_seconds)


def _measured_table(recipe: Recipe, run: RunFolder) -> dict:
    parent, shape = load_parent(run)
    machine = machine_of(recipe)
    busy = psutil.cpu_percent(interval=0.5)
    if busy > BUSY_PERCENT:
        console.print(
            f"  Other work keeps this machine {busy:.0f} % busy: runtimes will be off. Better measure when it is idle."
        )
    specs = search_space_of(recipe, shape).kinds()
    for spec in (NoOpAttention(), NoOpFFN()):
        if spec not in specs:
            specs.append(spec)
    scenarios = {s.name: s.scenario() for s in recipe.scenarios}
    probes = {name: probe_model(parent, architecture) for name, architecture in _architectures(shape, specs).items()}
    probes["parent"] = parent
    engine = TorchEngine()
    with torch.inference_mode(), progress("measure costs, repeat", recipe.costs.repeats) as ticker:
        for model in probes.values():
            engine.prepare(model)
        parts = interleaved_medians(
            list(probes),
            scenarios,
            lambda name, scenario: engine.time_parts(probes[name], scenario, recipe.costs.decode_steps_measured),
            recipe.costs.repeats,
            ticker.advance,
        )
        whole = interleaved_medians(
            ["parent"], scenarios, lambda name, s: engine.time_request(probes[name], s), 3, lambda: None
        )["parent"]
    layers = shape.num_hidden_layers
    table = {
        "machine": describe(machine),
        "other_load_percent": busy,
        "load_average_1_min": os.getloadavg()[0],
        "num_hidden_layers": layers,
        "bytes": _bytes(parent, probes, specs),
        "scenarios": {},
    }
    for name in scenarios:
        empty = parts["empty"][name]
        variants = {
            spec.id: _per_layer(parts[_probe_name(shape, spec)][name], parts[_without(spec.slot)][name], layers)
            for spec in specs
        }
        table["scenarios"][name] = {
            "fixed": {"prefill_ms": empty.prefill_ms, "decode_step_ms": empty.decode_step_ms},
            "variants": variants,
            "parent_measured": {
                "prefill_ms": whole[name].prefill_ms,
                "decode_step_ms": whole[name].decode_step_ms,
            },
        }
    return table


def _given_table(recipe: Recipe, path: Path) -> dict:
    if not path.is_file():
        raise ArtifactError(f"There is no cost table {path}; leave out costs.file to measure one.")
    table = read_json(path)
    lacking = {"machine", "bytes", "scenarios"} - set(table)
    lacking |= {s.name for s in recipe.scenarios} - set(table.get("scenarios", {}))
    if lacking:
        missing = ", ".join(sorted(lacking))
        raise ArtifactError(f"The cost table {path} lacks {missing}; leave out costs.file to measure one.")
    return table


def _probe_name(shape: ParentShape, spec: Spec) -> str:
    return "parent" if spec == shape.parent_spec(spec.slot) else spec.id


def _without(slot: str) -> str:
    return (NoOpAttention() if slot == "attention" else NoOpFFN()).id


def _architectures(shape: ParentShape, specs: list[Spec]) -> dict[str, Architecture]:
    """Probe name -> the same block in every layer."""
    parent = {slot: shape.parent_spec(slot) for slot in SLOTS}
    blocks: dict[str, dict[str, Spec]] = {"empty": {"attention": NoOpAttention(), "ffn": NoOpFFN()}}
    for spec in specs:
        if spec != parent[spec.slot]:
            blocks[spec.id] = {**parent, spec.slot: spec}
    return {name: Architecture((block,) * shape.num_hidden_layers) for name, block in blocks.items()}


def _per_layer(with_it: RequestTime, without: RequestTime, layers: int) -> dict[str, float]:
    return {
        "prefill_ms": max(0.0, with_it.prefill_ms - without.prefill_ms) / layers,
        "decode_step_ms": max(0.0, with_it.decode_step_ms - without.decode_step_ms) / layers,
    }


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
    fixed = sum(w.numel() for w in probes["empty"].parameters())
    return {"fixed": {"parameters": fixed, "parameter_bytes": fixed * itemsize}, "variants": variants}
