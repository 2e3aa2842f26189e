"""What else could make BLD faster: grouped products, compiled sub-blocks, variants side by side on threads.

Each beside BLD as it is, in the same run, on one layer of the quickstart's parent.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from achieved import median_seconds
from torch.nn import functional as F

from puzzle_nas.training.block_steps import BlockTask, Job, Trainee


def alternatives(task: BlockTask, starts, parent, settings, sequences: torch.Tensor) -> dict[str, float]:
    """Speed-ups over BLD as it is; below 1 is slower."""

    def fresh() -> list[Trainee]:
        job_of = {spec: Job((spec,), Path(), dict, {}) for spec in starts}
        return [Trainee(job_of[s], start, parent, task.parent_layer, settings, 1000) for s, start in starts.items()]

    def train(trainee: Trainee, batch) -> None:
        task.update(trainee, batch, trainee.optimiser.rate_at(0))

    def step_of(trainees: list[Trainee]):
        def step() -> None:
            batch = task.fetch(sequences)
            for trainee in trainees:
                train(trainee, batch)

        return step

    plain, compiled = fresh(), fresh()
    for trainee in compiled:
        for block in trainee.blocks.values():
            block.self_attn, block.mlp = (m and torch.compile(m) for m in (block.self_attn, block.mlp))
    start = time.perf_counter()
    step_of(compiled)()
    result = {"bld_compile_seconds_a_layer": time.perf_counter() - start}
    seconds = median_seconds({"plain": step_of(plain), "compiled": step_of(compiled)})
    result["bld_speedup_compiled"] = seconds["plain"] / seconds["compiled"]
    result["bld_speedup_grouped_at_most"] = _grouped(task, starts, sequences)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:

        def side_by_side() -> None:
            batch = task.fetch(sequences)
            _ = batch.attention_in, batch.ffn_in
            list(pool.map(lambda trainee: train(trainee, batch), plain))

        beside = median_seconds({"threads": side_by_side})["threads"]
    torch.set_num_threads(threads)
    result["bld_speedup_variants_on_threads"] = seconds["plain"] / beside
    return result


def _grouped(task: BlockTask, starts, sequences: torch.Tensor) -> float:
    """All products that read the FFN's normed input: one wide product against one for each variant, forward."""
    x = task.fetch(sequences).ffn_in.flatten(0, 1)
    readers = [
        w.to(x.dtype)
        for start in starts.values()
        for name, w in start.items()
        if name.startswith("mlp.") and w.shape[-1] == x.shape[1] and "down_proj" not in name
    ]
    wide = torch.cat(readers)
    works = {"alone": lambda: [F.linear(x, w) for w in readers], "grouped": lambda: F.linear(x, wide)}
    seconds = median_seconds(works, 30)
    return seconds["alone"] / seconds["grouped"]
