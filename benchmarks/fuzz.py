"""Damage to tiny checkpoints' files: does each give transformers' own logits, or one sentence and exit code 2?

Values of config.json and of the other small files changed or dropped, tensors dropped, renamed, reshaped, retyped,
files cut, emptied, filled with noise, tokenizers edited; every mutation from a seed of its own, so that one can be
repeated alone. python benchmarks/fuzz.py [--mutations 500] [--seed 0] [--only 17]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from results import save

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.parents.mutations import bases, mutate, outcome

OUTCOMES = ("same_function", "refused_in_one_sentence", "tracebacks", "silently_different")


def main() -> None:
    """Print every fault and each kind of sentence once; keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one mutation and print what became of it")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        sound = bases(Path(name) / "sound")
        for number in range(arguments.mutations) if arguments.only is None else [arguments.only]:
            rng = random.Random(f"{arguments.seed}-{number}")
            folder = Path(name) / "parent"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base := rng.choice(sound), folder)
            done = mutate(folder, rng)
            became, why = outcome(folder)
            counts[became] += 1
            fault = became not in ("same_function", "refused_in_one_sentence")
            if fault or arguments.only is not None or number % 25 == 0:
                print(f"{number}: {base.name}: {done} -> {became}: {why.replace(name, '')[:300]}", flush=True)
    figures = {"mutations": sum(counts.values()), **{outcome: counts[outcome] for outcome in OUTCOMES}}
    print(figures)
    if arguments.only is None:
        print(f"Kept in {save('fuzz', figures)}")


if __name__ == "__main__":
    main()
