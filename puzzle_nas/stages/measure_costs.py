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

from puzzle_nas.architecture import Architecture, NoOpAttention, NoOpFFN, ParentShape, Spec
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.engines import RequestTime, TorchEngine
from puzzle_nas.engines.torch_engine import interleaved_medians
from puzzle_nas.errors import ArtifactError
from puzzle_nas.families import child_config, load_parent
from puzzle_nas.families.loading import build, describe, machine_of
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
    probes = {name: _probe(parent, shape, *block) for name, block in _blocks(shape, specs).items()}
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


def _blocks(shape: ParentShape, specs: list[Spec]) -> dict[str, tuple[Spec, Spec]]:
    """Probe name -> what stands in (attention, ffn) of every layer."""
    attention, ffn = shape.parent_spec("attention"), shape.parent_spec("ffn")
    blocks: dict[str, tuple[Spec, Spec]] = {"empty": (NoOpAttention(), NoOpFFN())}
    for spec in specs:
        if spec not in (attention, ffn):
            blocks[spec.id] = (spec, ffn) if spec.slot == "attention" else (attention, spec)
    return blocks


def _probe(parent: PuzzleForCausalLM, shape: ParentShape, attention: Spec, ffn: Spec) -> PuzzleForCausalLM:
    """A model with the same block in every layer; the parent's weights are shared where they fit, others random."""
    block = {"attention": attention, "ffn": ffn}
    config = child_config(parent.config, Architecture((block,) * shape.num_hidden_layers))
    with torch.device("meta"):
        names = PuzzleForCausalLM(config).state_dict()
    given = parent.state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: given[name]
        if name in given and given[name].shape == meta.shape
        else torch.randn(meta.shape, generator=generator).mul_(0.02).to(device=parent.device, dtype=parent.dtype)
        for name, meta in names.items()
    }
    return build(config, weights)


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
