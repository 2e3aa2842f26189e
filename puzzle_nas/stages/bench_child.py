"""Parent against child on a serving engine, scenario by scenario, as in Puzzle's Table 3.

Both are exports, so both have been verified. For each scenario and each of the two the batch size with the highest
throughput is taken; then the two are interleaved, so that other load hits both alike.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puzzle_nas.engines import Loading, ServingEngine
from puzzle_nas.errors import ExportError
from puzzle_nas.progress import progress
from puzzle_nas.scenario import Scenario

TABLE_3 = ((128, 128), (128, 1024), (128, 2048), (128, 4096), (2048, 128), (2048, 2048))
"""Prompt and output tokens in the paper's Table 3."""
MODELS = ("parent", "child")


def scenario_lengths(name: str, scale: int) -> list[tuple[int, int]]:
    """Prompt and output lengths: `table3`, or `PROMPT/OUTPUT,...`; each divided by `scale`.

    Raises:
        ExportError: neither.
    """
    if name == "table3":
        pairs: Sequence[tuple[int, int]] = TABLE_3
    else:
        try:
            pairs = [(int(a), int(b)) for a, b in (pair.split("/") for pair in name.split(","))]
        except ValueError:
            raise ExportError(f"'{name}' names no scenarios; write table3, or PROMPT/OUTPUT such as 128/64.") from None
    return [(max(1, prompt // scale), max(2, output // scale)) for prompt, output in pairs]


def bench(
    engine: ServingEngine,
    exports: dict[str, Path],
    lengths: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    repeats: int,
    threads: int | None,
    loading: Loading | None = None,
) -> dict[str, Any]:
    """Times of `parent` and `child` exports; JSON. The KV cache is as `loading` says, or else the child's record.

    Raises:
        ExportError: an export that this engine does not load, or a way of loading that it does not offer.
        EngineError: the engine is not installed or fails.
    """
    loading = loading or Loading()
    engine.refuse(loading)
    precisions = {model: engine.precision_of(exports[model]) for model in MODELS}
    loading = replace(loading, kv_format=loading.kv_format or engine.loading_of(exports["child"]).kv_format)
    result: dict[str, Any] = {"engine": engine.name, "threads": threads, "load_average_1_min": os.getloadavg()[0]}
    result |= {"precision": precisions, "loading": asdict(loading)}
    total = len(lengths) * (len(batch_sizes) + repeats) * len(MODELS)
    with (
        engine.load(exports["parent"], precisions["parent"], threads, loading=loading) as parent,
        engine.load(exports["child"], precisions["child"], threads, loading=loading) as child,
        progress("bench, request batch", total) as ticker,
    ):
        loaded = {"parent": parent, "child": child}
        result["version"] = engine.version(parent)
        for worker in loaded.values():
            engine.prepare(worker)
        result["scenarios"] = {
            f"{prompt}/{output}": _scenario(engine, loaded, prompt, output, batch_sizes, repeats, ticker)
            for prompt, output in lengths
        }
        result["memory"] = memory = {
            model: {**engine.memory(loaded[model]), "weight_bytes": _weight_bytes(exports[model])} for model in MODELS
        }
    for row in result["scenarios"].values():
        for model in MODELS:
            facts, per_token = row[model], memory[model]["kv_cache_bytes_per_token"]
            facts["tokens_per_second_per_device"] = facts["tokens_per_second"] / loading.tensor_parallel
            tokens = facts["batch_size"] * row["tokens_per_request"]
            facts["kv_cache_bytes"] = None if per_token is None else per_token * tokens
    result["load_average_1_min_after"] = os.getloadavg()[0]
    return result


def _scenario(engine, loaded, prompt: int, output: int, batch_sizes, repeats: int, ticker) -> dict[str, Any]:
    scenarios = [Scenario(f"{prompt}/{output}", size, prompt, output) for size in batch_sizes]
    best: dict[str, Scenario] = {}
    for model in MODELS:
        found = {}
        for scenario in scenarios:
            found[scenario.batch_size] = _throughput(engine.time_request(loaded[model], scenario), scenario)
            ticker.advance()
        best[model] = next(s for s in scenarios if s.batch_size == max(found, key=found.__getitem__))
    times: dict[str, list] = {model: [] for model in MODELS}
    for _ in range(repeats):
        for model in MODELS:
            times[model].append(engine.time_request(loaded[model], best[model]))
            ticker.advance()
    result: dict[str, Any] = {
        model: {
            "batch_size": best[model].batch_size,
            "tokens_per_second": statistics.median(_throughput(t, best[model]) for t in times[model]),
            "time_to_first_token_ms": statistics.median(t.prefill_ms for t in times[model]),
            "decode_step_ms": statistics.median(t.decode_step_ms for t in times[model]),
        }
        for model in MODELS
    }
    ratios = [
        _throughput(child, best["child"]) / _throughput(parent, best["parent"])
        for parent, child in zip(times["parent"], times["child"], strict=True)
    ]
    result["tokens_per_request"] = prompt + output
    return {**result, "speedup": statistics.median(ratios), "speedup_by_repeat": sorted(ratios)}


def _throughput(time, scenario: Scenario) -> float:
    """Prompt and generated tokens of all requests of the batch, per second."""
    return 1e3 * scenario.batch_size * scenario.total_tokens / time.total_ms(scenario)


def _weight_bytes(export: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in export.glob(pattern))
