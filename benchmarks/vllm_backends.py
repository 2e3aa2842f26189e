"""What vLLM's transformers backend, which our plugin builds on, costs beside vLLM's own model classes.

SmolLM2, and a child of it with random variants that stock vLLM holds too (KV heads, FFN widths, no-ops), each written
twice: for vLLM's own classes (LlamaForCausalLM, DeciLMForCausalLM) and for our plugin. These two are timed in turns, in
CPU time of one thread, compiled and as written. Exchanged weights are random.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedModel

from benchmarks.common import SMOLLM2, save
from puzzle_nas.architecture import Architecture
from puzzle_nas.engines import ServingEngine, undisturbed
from puzzle_nas.engines.vllm import EagerVllmEngine, StockVllmEngine, VllmEngine
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.exporters.base import DTYPES
from puzzle_nas.families import architecture_of, build, find_checkpoint, open_parent, probe_model, save_model
from puzzle_nas.machine import describe, this_machine
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.scenario import Scenario
from puzzle_nas.search_space import SearchSpace, build_search_space
from puzzle_nas.servable import servable_space

SCENARIOS = (Scenario("128_64", 1, 128, 64), Scenario("16_128", 1, 16, 128))
PARTS = ("prefill", "decode_step")
REPEATS = 4
Times: TypeAlias = dict[tuple[str, str, str], list[float]]
SCRIPT = StockVllmEngine.worker_script
IN_CPU_TIME = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
time.perf_counter = time.process_time
exec(compile(open({str(SCRIPT)!r}).read(), {str(SCRIPT)!r}, "exec"))
"""
"""A worker that counts what its only thread computes, so that what else the machine does is left out."""


class EagerStockVllmEngine(StockVllmEngine):
    """Stock vLLM, running models as they are written."""

    def environment(self) -> dict[str, str]:
        """See `ServingEngine.environment`."""
        return {**super().environment(), "PUZZLE_VLLM_EAGER": "1"}


MODES: dict[str, dict[str, ServingEngine]] = {
    "compiled": {"plugin": VllmEngine(), "own": StockVllmEngine()},
    "eager": {"plugin": EagerVllmEngine(), "own": EagerStockVllmEngine()},
}


def random_child(space: SearchSpace) -> Architecture:
    """One variant for each sub-block, the parent's own for every other one."""
    draw, architecture = random.Random(0), space.parent
    for layer, slots in enumerate(space.options):
        for specs in slots.values():
            architecture = architecture.replaced(layer, draw.choice([*specs[1:], *[specs[0]] * len(specs)]))
    return architecture


def written(parent: PreTrainedModel, precision: str, work: Path) -> dict[str, Path]:
    """Both models for the plugin and for vLLM's own classes, by name."""
    shape = architecture_of(parent.config)
    asked = SearchSpaceSettings(width_fractions=[0.75, 0.5, 0.25])
    space = build_search_space(shape, asked, (), shape.slots, {})
    space = servable_space(space, ["vllm-stock"], parent.config.model_type)
    child = Child(probe_model(parent, random_child(space)), None)
    folders = {name: work / name for name in ("parent plugin", "parent own", "child plugin", "child own")}
    for folder in folders.values():
        folder.mkdir()
    # transformers refuses to save what it loaded from GGUF.
    weights = {name: weight.to(DTYPES[precision]) for name, weight in parent.state_dict().items()}
    save_model(build(parent.config, weights), None, folders["parent own"])
    EXPORTERS["decilm"].write(child, folders["child own"], precision)
    EXPORTERS["vllm"].write(Child(parent, None), folders["parent plugin"], precision)
    EXPORTERS["vllm"].write(child, folders["child plugin"], precision)
    return folders


def times(engines: Mapping[str, ServingEngine], folders: Mapping[str, Path], precision: str, model: str) -> Times:
    """By way, scenario and part, of every repeat: plugin and own in turns."""
    found: Times = {}
    with ExitStack() as stack:
        loaded = {}
        for way, engine in engines.items():
            loaded[way] = stack.enter_context(engine.load(folders[f"{model} {way}"], precision, threads=1))
            for scenario in SCENARIOS:
                engine.time_request(loaded[way], scenario)
        for _ in range(REPEATS):
            for scenario in SCENARIOS:
                for way, engine in engines.items():
                    time = engine.time_request(loaded[way], scenario)
                    for part in PARTS:
                        found.setdefault((way, scenario.name, part), []).append(getattr(time, f"{part}_ms"))
    return found


def figures_of(label: str, found: Times) -> dict[str, float]:
    """Times, and how many times as fast the plugin is as vLLM's own classes."""
    figures = {}
    for scenario in SCENARIOS:
        for part in PARTS:
            ms = {way: undisturbed(found[way, scenario.name, part]) for way in ("plugin", "own")}
            for way, value in ms.items():
                figures[f"{part}_cpu_ms_{label}_{scenario.name}_{way}"] = value
            figures[f"plugin_over_own_speed_{label}_{scenario.name}_{part}"] = ms["own"] / ms["plugin"]
    return figures


def main(precision: str = "float32") -> None:
    """Write, time, and keep the figures of every mode and model as soon as they are there."""
    parent, _ = open_parent(find_checkpoint(SMOLLM2, Path("runs/benchmark-vllm-backends")))
    machine = describe(this_machine()) | {"precision": precision, "threads": 1, "cores": os.cpu_count()}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        worker = Path(work) / "worker.py"
        worker.write_text(IN_CPU_TIME)
        folders = written(parent, precision, Path(work))
        for mode, engines in MODES.items():
            for engine in engines.values():
                type(engine).worker_script = worker
            for model in ("child", "parent"):
                found = figures_of(f"{mode}_{model}", times(engines, folders, precision, model))
                found[f"load_average_1_min_{mode}_{model}"] = os.getloadavg()[0]
                for name, value in found.items():
                    print(f"{name} {value:.4g}", flush=True)
                figures |= found
                save("vllm_backends", figures, machine)
