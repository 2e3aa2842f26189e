"""Damage to tiny checkpoints' files: does each give transformers' own logits, or one sentence and exit code 2?

Values of config.json and of the other small files changed or dropped, tensors dropped, renamed, reshaped, retyped,
files cut, emptied, filled with noise, tokenizers edited; every mutation from a seed of its own, so that one can be
repeated alone with --only.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.common import report
from tests.parents.mutations import bases, mutate, outcome

OUTCOMES = ("same_function", "refused_in_one_sentence", "tracebacks", "silently_different")


def main(mutations: int = 500, seed: int = 0, only: int | None = None) -> None:
    """Print every fault and each kind of sentence once; keep the counts."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        sound = bases(Path(name) / "sound")
        for number in range(mutations) if only is None else [only]:
            rng = random.Random(f"{seed}-{number}")
            folder = Path(name) / "parent"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base := rng.choice(sound), folder)
            done = mutate(folder, rng)
            became, why = outcome(folder)
            counts[became] += 1
            fault = became not in ("same_function", "refused_in_one_sentence")
            if fault or only is not None or number % 25 == 0:
                print(f"{number}: {base.name}: {done} -> {became}: {why.replace(name, '')[:300]}", flush=True)
    figures = {"mutations": sum(counts.values()), **{outcome: counts[outcome] for outcome in OUTCOMES}}
    if only is None:
        report("fuzz", figures)
