"""What an engine computes and how fast.

A run's parent and child, and a model with every variant that the engine serves, are exported and verified. Then parent
and child are timed in turns, in scenarios shaped as the paper's Table 3 and, where the run's costs were measured on
this engine, in the run's own, beside what the costs predict. A child that the engine's format cannot hold is named and
not timed. That planted errors are caught is shown in tests/engines.

python benchmarks/engines.py RUN ENGINE PRECISION [PROMPT/OUTPUT,...]
adds to results/engines.json and draws results/engines-ENGINE-PRECISION.png
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from results import RESULTS, save

from puzzle_nas.architecture import GatedFFN, GroupedAttention, Linear, NoOp, Scenario, WindowAttention
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.engines import RequestTime, ServingEngine, serving_engine
from puzzle_nas.engines.base import EXPORT_RECORD
from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS
from puzzle_nas.families import architecture_of, load_model, load_tokenizer, parent_checkpoint, probe_model, save_model
from puzzle_nas.machine import Machine
from puzzle_nas.pipeline import open_run
from puzzle_nas.servable import SERVERS
from puzzle_nas.stages.bench_child import MODELS, bench, scenario_lengths
from puzzle_nas.stages.export_child import export_child

SCALE = 16
BATCH_SIZES = (1, 8)
WINDOW = 16
"""Of attention, in tokens: less than the texts that exports are verified on."""
REPEATS = 3


def every_kind(parent: Path, folder: Path, server: str) -> Path:
    """The parent with every variant kind that a server holds, the first and last layers too; new weights are random."""
    model = load_model(parent, Machine(torch.device("cpu"), torch.float32))
    architecture = architecture_of(model.config)
    last, width = len(architecture.layers) - 1, model.config.intermediate_size
    for layer, spec in (
        (0, NoOp("attention")),
        (2, GroupedAttention(1)),
        (2, NoOp("ffn")),
        (4, Linear("attention")),
        (4, GatedFFN(width // 2)),
        (6, WindowAttention(WINDOW, model.config.num_key_value_heads)),
        (6, Linear("ffn")),
        (8, NoOp("attention")),
        (8, NoOp("ffn")),
        (10, GatedFFN(width // 4 // 32 * 32)),
        (12, NoOp("attention")),
        (12, Linear("ffn")),
        (last - 1, Linear("attention")),
        (last - 1, Linear("ffn")),
        (last, NoOp("ffn")),
    ):
        if SERVERS[server].refusal(layer, spec) is None:
            architecture = architecture.replaced(layer, spec)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(probe_model(model, architecture), load_tokenizer(parent), folder)
    return folder


def verified(checkpoints: dict[str, Path], engine: ServingEngine, precision: str, work: Path, label: str):
    """The exports, by name, and how far each is from torch. What was exported before is taken as it is."""
    to = engine.formats[0]
    quantised = precision in engine.quantised
    arguments = (to, None if quantised else precision, precision if quantised else None)
    exports, figures = {}, {}
    for name, checkpoint in checkpoints.items():
        folder = work / name / f"{to}-{precision}"
        if not (folder / EXPORT_RECORD).is_file() or name == "every_kind":
            try:
                export_child(checkpoint, *arguments, work / name)
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


def predicted_over_measured(
    run: RunFolder, checkpoints: dict[str, Path], engine: ServingEngine, precision: str, exports, label: str
) -> dict[str, float]:
    """Whole requests in the run's scenarios: the cost table's sums over the engine's times; none without a table."""
    recipe = open_run(run)
    if recipe.engine != engine.name or not run.costs(engine.name).is_file():
        print(f"{run} has no costs of {engine.name}; make them with: puzzle run RECIPE engine={engine.name}")
        return {}
    tables = CostTable.load_mixes(run, recipe)
    measured_in = tables[0].data["machine"]["precision"]
    if measured_in != precision:
        print(f"The costs of {run} are of {measured_in}, not of {precision}; nothing to compare.")
        return {}
    architectures = {
        name: architecture_of(load_model(checkpoints[name], Machine(torch.device("cpu"), torch.float32)).config)
        for name in MODELS
    }
    figures: dict[str, float] = {}
    for table in tables:
        for s in table.scenarios:
            result = bench(engine, exports, [(s.prefill_tokens, s.decode_tokens)], (s.batch_size,), REPEATS, None)
            (row,) = result["scenarios"].values()
            ratios = {name: table.request_ms(architectures[name], s) / _whole_ms(row[name], s) for name in MODELS}
            for name, ratio in ratios.items():
                figures[f"predicted_over_measured_{label}_{s.name}_{name}"] = round(ratio, 4)
            figures[f"predicted_over_measured_{label}_{s.name}_speedup"] = round(ratios["parent"] / ratios["child"], 4)
    return figures


def _whole_ms(facts: dict, scenario: Scenario) -> float:
    return RequestTime(facts["time_to_first_token_ms"], facts["decode_step_ms"]).total_ms(scenario)


def draw(result: dict, picture: Path) -> None:
    """Throughput of parent and child by scenario."""
    scenarios = result["scenarios"]
    _, axis = plt.subplots(figsize=(8, 4))
    for offset, name in zip((-0.2, 0.2), MODELS, strict=True):
        rates = [row[name]["tokens_per_second"] for row in scenarios.values()]
        bars = axis.bar([i + offset for i in range(len(rates))], rates, 0.4, label=name)
    axis.bar_label(bars, [f"{row['speedup']:.2f}x" for row in scenarios.values()])
    axis.set_xticks(range(len(scenarios)), list(scenarios))
    axis.set(xlabel="prompt/output tokens", ylabel="tokens per second", title=picture.stem.replace("-", " "))
    axis.margins(y=0.15)
    axis.legend()
    plt.tight_layout()
    plt.savefig(picture, dpi=100)


def main() -> None:
    """Export, verify, time, predict, draw, and keep the figures."""
    run, engine, precision = RunFolder(sys.argv[1]), serving_engine(sys.argv[2]), sys.argv[3]
    scenarios = sys.argv[4] if len(sys.argv) > 4 else None
    server = EXPORTERS[engine.formats[0]].server
    label, work = engine.name.replace(".", "_").replace("-", "_"), Path("runs/benchmark-engines")
    label += "" if precision == "bfloat16" else f"_{precision}"
    parent = parent_checkpoint(run)
    checkpoints = {"parent": parent, "child": run / "child-gkd"}
    checkpoints["every_kind"] = every_kind(parent, work / "every-kind", server)
    kept = RESULTS / "engines.json"
    figures = json.loads(kept.read_text())["figures"] if kept.is_file() else {}
    exports, errors = verified(checkpoints, engine, precision, work, label)
    figures |= errors
    if set(MODELS) <= set(exports):
        lengths = scenario_lengths(scenarios or "table3", 1 if scenarios else SCALE)
        result = bench(engine, exports, lengths, BATCH_SIZES, REPEATS, threads=None)
        for name, row in result["scenarios"].items():
            figures[f"speedup_{label}_{name.replace('/', '_')}"] = row["speedup"]
        for name, facts in result["memory"].items():
            figures |= {f"{quantity}_{label}_{name}": value for quantity, value in facts.items() if value is not None}
        figures[f"load_average_1_min_{label}"] = result["load_average_1_min_after"]
        draw(result, RESULTS / f"engines-{engine.name}-{precision}.png")
        print(json.dumps(result, indent=1))
        figures |= predicted_over_measured(run, checkpoints, engine, precision, exports, label)
    print("Written to", save("engines", figures))


if __name__ == "__main__":
    main()
