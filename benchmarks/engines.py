"""What an engine computes and how fast: a run's child and parent on it.

A run's parent and child, and a model with every variant that the engine serves, are exported and verified. Then parent
and child are timed in turns, in scenarios shaped as the paper's Table 3. A child that the engine's format cannot hold
is named and not timed. That planted errors are caught is shown in tests/engines. Adds to results/engines.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import RunArgument, kept, save
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.engines import ServingEngine, serving_engine
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS
from puzzle_nas.families import architecture_of, load_model, load_tokenizer, parent_checkpoint, probe_model, save_model
from puzzle_nas.machine import Machine
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp, WindowAttention
from puzzle_nas.stages.bench_child import MODELS, bench, scenario_lengths
from puzzle_nas.stages.export_child import export_child

SCALE = 16
"""Lengths are the paper's over this."""
BATCH_SIZES = (1, 8)
WINDOW = 16
"""Of attention, in tokens: less than the texts that exports are verified on."""
REPEATS = 3
WORK = Path("runs/benchmark-engines")
PLAIN = Machine(torch.device("cpu"), torch.float32)


def every_kind(parent: Path, folder: Path, server: str) -> Path:
    """The parent with every variant kind that a server holds, the first and last layers too; new weights are random."""
    model = load_model(parent, PLAIN)
    architecture = architecture_of(model.config)
    last, width = len(architecture.layers) - 1, model.config.intermediate_size
    specs = {
        0: (NoOp("attention"),),
        2: (GroupedAttention(1), NoOp("ffn")),
        4: (Linear("attention"), GatedFFN(width // 2)),
        6: (WindowAttention(WINDOW, model.config.num_key_value_heads), Linear("ffn")),
        8: (NoOp("attention"), NoOp("ffn")),
        10: (GatedFFN(width // 4 // 32 * 32),),
        12: (NoOp("attention"), Linear("ffn")),
        last - 1: (Linear("attention"), Linear("ffn")),
        last: (NoOp("ffn"),),
    }
    for layer, spec in ((layer, spec) for layer, of_layer in specs.items() for spec in of_layer):
        own = architecture.layers[layer][spec.slot]
        if SERVERS[server].refusal(layer, spec, own, model.config.model_type) is None:
            architecture = architecture.replaced(layer, spec)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(probe_model(model, architecture), load_tokenizer(parent), folder)
    return folder


def verified(checkpoints: dict[str, Path], engine: ServingEngine, precision: str, label: str):
    """The exports, by name, and how far each is from torch. What was exported before is taken as it is."""
    to = engine.formats[0]
    quantised = precision in engine.quantised
    arguments = (to, None if quantised else precision, precision if quantised else None)
    exports, figures = {}, {}
    for name, checkpoint in checkpoints.items():
        folder = WORK / name / f"{to}-{precision}"
        if not (folder / EXPORT_RECORD).is_file() or name == "every_kind":
            try:
                export_child(checkpoint, *arguments, WORK / name)
            except ExportError as refusal:
                if "cannot be exported" not in str(refusal):
                    raise
                print(f"{name}: {refusal}")
                continue
        check = read_json(folder / EXPORT_RECORD)["verification"][precision]
        figures[f"max_logprob_error_{label}_{name}"] = check["max_nats"]
        figures[f"mean_logprob_error_{label}_{name}"] = check["mean_nats"]
        exports[name] = folder
    return exports, figures


def main(
    run: RunArgument,
    engine: str,
    precision: str = "bfloat16",
    scenarios: Annotated[str, typer.Option(help="PROMPT/OUTPUT,...; without it, Table 3 over 16.")] = "",
) -> None:
    """Export, verify, time, and keep the figures."""
    serving, folder = serving_engine(engine), RunFolder(run)
    label = engine.replace(".", "_").replace("-", "_") + ("" if precision == "bfloat16" else f"_{precision}")
    parent = parent_checkpoint(folder)
    checkpoints = {"parent": parent, "child": folder / "child-gkd"}
    server = EXPORTERS[serving.formats[0]].server
    checkpoints["every_kind"] = every_kind(parent, WORK / "every-kind", server)
    exports, figures = verified(checkpoints, serving, precision, label)
    figures = kept("engines") | figures
    if set(MODELS) <= set(exports):
        lengths = scenario_lengths(scenarios or "table3", 1 if scenarios else SCALE)
        result = bench(serving, exports, lengths, BATCH_SIZES, REPEATS, threads=None)
        for name, row in result["scenarios"].items():
            figures[f"speedup_{label}_{name.replace('/', '_')}"] = row["speedup"]
        for name, facts in result["memory"].items():
            figures |= {f"{quantity}_{label}_{name}": value for quantity, value in facts.items() if value is not None}
        figures[f"load_average_1_min_{label}"] = result["load_average_1_min_after"]
        print(json.dumps(result, indent=1))
    print("Written to", save("engines", figures))
