"""What an engine computes and how fast: exports of a run's child and of one with every variant kind, verified, then
parent and child in turns in scenarios shaped as the paper's Table 3.

python benchmarks/engines.py RUN FORMAT PRECISION [PROMPT/OUTPUT,...]    adds to results/engines.json
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from results import RESULTS, save

from puzzle_nas.architecture import (
    Architecture,
    GatedFFN,
    GroupedAttention,
    LinearAttention,
    LinearFFN,
    NoOpAttention,
    NoOpFFN,
)
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.engines import serving_engine
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.exporters import EXPORTERS
from puzzle_nas.families import Machine, load_model, load_tokenizer, save_model
from puzzle_nas.families.loading import parent_checkpoint, probe_model, shape_of
from puzzle_nas.stages.bench_child import bench, scenario_lengths
from puzzle_nas.stages.export_child import export_child

SCALE = 16
BATCH_SIZES = (1, 8)
REPEATS = 3


def every_kind(parent: Path, folder: Path) -> Path:
    """The parent with every variant kind in it, the first and last layers too; new weights are random."""
    model = load_model(parent, Machine(torch.device("cpu"), torch.float32))
    shape = shape_of(model.config)
    architecture, last = Architecture.of_parent(shape), shape.num_hidden_layers - 1
    width = shape.intermediate_size
    for layer, spec in (
        (0, NoOpAttention()),
        (2, GroupedAttention(1)),
        (2, NoOpFFN()),
        (4, LinearAttention()),
        (4, GatedFFN(width // 2)),
        (6, LinearFFN()),
        (8, NoOpAttention()),
        (8, NoOpFFN()),
        (10, GatedFFN(width // 4 // 32 * 32)),
        (12, NoOpAttention()),
        (12, LinearFFN()),
        (last - 1, LinearAttention()),
        (last - 1, LinearFFN()),
        (last, NoOpFFN()),
    ):
        architecture = architecture.replaced(layer, spec)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(probe_model(model, architecture), load_tokenizer(parent), folder)
    return folder


def main() -> None:
    """Export, verify, time, and keep the figures."""
    run, to, precision = RunFolder(sys.argv[1]), sys.argv[2], sys.argv[3]
    scenarios = sys.argv[4] if len(sys.argv) > 4 else None
    engine, work = serving_engine(EXPORTERS[to].engine), Path("runs/benchmark-engines")
    quantised = precision in engine.quantised
    arguments = (to, None if quantised else precision, precision if quantised else None)
    parent = parent_checkpoint(run)
    checkpoints = {"parent": parent, "child": run / "child-gkd", "every_kind": work / "every-kind"}
    every_kind(parent, checkpoints["every_kind"])
    kept = RESULTS / "engines.json"
    figures = json.loads(kept.read_text())["figures"] if kept.is_file() else {}
    exports = {}
    for name, checkpoint in checkpoints.items():
        exports[name] = work / name / f"{to}-{precision}"
        if not (exports[name] / EXPORT_RECORD).is_file() or name == "every_kind":
            export_child(checkpoint, *arguments, work / name)
        check = read_json(exports[name] / EXPORT_RECORD)["verification"][precision]
        figures[f"max_logprob_error_{to}_{precision}_{name}"] = check["max_nats"]
        figures[f"mean_logprob_error_{to}_{precision}_{name}"] = check["mean_nats"]
    lengths = scenario_lengths(scenarios or "table3", 1 if scenarios else SCALE)
    result = bench(engine, exports, lengths, BATCH_SIZES, REPEATS, threads=None)
    label = engine.name.replace(".", "_")
    for name, row in result["scenarios"].items():
        figures[f"speedup_{label}_{precision}_{name.replace('/', '_')}"] = row["speedup"]
    save("engines", figures)
    print(json.dumps(result, indent=1))


main()
