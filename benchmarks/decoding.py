"""Tokens a second that the parent writes for the source `parent-samples`, beside transformers' own cache and attention.

48 rows of 256 tokens, in turns; the floor is the time of the same matrix products alone.
python benchmarks/decoding.py: needs runs/quickstart, about five minutes on two cores
"""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager

import torch
from results import save
from torch import nn
from transformers.cache_utils import DynamicCache

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.decoding import decoding
from puzzle_nas.families import load_parent, machine_of
from puzzle_nas.modeling import CACHE
from puzzle_nas.pipeline import open_run

RUN = RunFolder("runs/quickstart")
ROWS, LENGTH, REPEATS = 48, 256, 3


@contextmanager
def transformers_own(model, length):
    """A cache that grows by concatenation, and the fused attention kernel."""
    yield DynamicCache(config=model.config)


WAYS = {"transformers_own": transformers_own, "ours": decoding}


@torch.inference_mode()
def seconds(model, way) -> float:
    """To write all rows, their tokens given."""
    tokens = torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    with way(model, LENGTH) as cache:
        for i in range(LENGTH):
            model(tokens[:, i : i + 1], use_cache=True, **{CACHE: cache})
    return time.perf_counter() - begin


@torch.inference_mode()
def floor(model) -> float:
    """The same for every matrix of the model alone, one after the other."""
    modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(ROWS, module.in_features, dtype=model.dtype) for module in modules]
    begin = time.perf_counter()
    for _ in range(LENGTH // 8):
        for module, x in zip(modules, inputs, strict=True):
            module(x)
    return 8 * (time.perf_counter() - begin)


def main() -> None:
    """See above."""
    machine_of(open_run(RUN))
    model, _ = load_parent(RUN)
    found: dict[str, list[float]] = {name: [] for name in (*WAYS, "floor")}
    for _ in range(REPEATS):
        for name, way in WAYS.items():
            found[name].append(seconds(model, way))
        found["floor"].append(floor(model))
    median = {name: statistics.median(values) for name, values in found.items()}
    figures = {f"tokens_per_second_{name}": ROWS * LENGTH / value for name, value in median.items()}
    figures["times_as_fast"] = median["transformers_own"] / median["ours"]
    figures["fraction_of_floor"] = median["floor"] / median["ours"]
    for key, value in figures.items():
        print(f"{key:36s}{value:9.2f}")
    print("Written to", save("decoding", figures))


if __name__ == "__main__":
    main()
