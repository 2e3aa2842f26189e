"""Puzzle, table 5: the child against a smaller model of its parent's family, at equal speed.

`--run RUN --sibling CHECKPOINT`: a run whose child was searched for at the sibling's speed. Accuracy is on
`python benchmarks/continuations.py`; KL and perplexity, on the run's validation split, only where both models split
text into the same tokens. Nothing is compared where the child is slower than the sibling by more than SLOWER.
"""

import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.common import Budget, Children, Measured, Table
from benchmarks.task_accuracy import USED, items_of, right_answers
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.families import load_model, load_tokenizer
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.machine import machine_of

PAPER = {"parent": 76.4, "child": 73.98, "sibling": 70.36}
SLOWER, REPEATS = 0.05, 5
NONE_HERE = (
    "No sibling: SmolLM2-135M is the smallest of its family. Online, take SmolLM2-360M-Instruct as the parent of a run "
    "and SmolLM2-135M-Instruct as its sibling: --run RUN --sibling CHECKPOINT."
)


def measure(budget: Budget, run: str | None, sibling: str | None) -> Measured:
    """Accuracy, perplexity, KL and measured speed of parent, child and sibling."""
    if sibling is None:
        return Measured({}, {}, NONE_HERE)
    children = Children(replace(budget, run=RunFolder(run)) if run else budget)
    recipe, parent = children.recipe, children.parent
    checkpoints = {"child": children.run / "child-gkd", "sibling": Path(sibling)}
    models = {"parent": parent} | {name: load_model(path, machine_of(recipe)) for name, path in checkpoints.items()}
    tokenizer, theirs = load_tokenizer(parent_checkpoint(children.run)), load_tokenizer(checkpoints["sibling"])
    columns: dict[str, dict[str, float]] = {"accuracy, %": {}, "perplexity": {}, "KL, nats": {}, "speed-up": {}}
    items = items_of("continuations", USED["continuations"])
    engine, scenarios = ENGINES[recipe.engine], children.found.costs.scenarios
    for name, model in models.items():
        own = theirs if name == "sibling" else tokenizer
        if items:
            right = right_answers(model, own, items)
            columns["accuracy, %"][name] = 100 * sum(right) / len(right)
        if own.get_vocab() == tokenizer.get_vocab():
            compared = children.validation.compare(model)
            columns["perplexity"][name], columns["KL, nats"][name] = compared.perplexity, compared.kl_nats
        with engine.loaded({"parent": parent, "child": model}, children.run / "scratch") as loaded:
            ratios = speedups(engine, loaded, scenarios, REPEATS, recipe.costs.decode_steps_measured)
        columns["speed-up"][name] = statistics.median(ratios)
    speed, accuracy = columns["speed-up"], columns["accuracy, %"]
    as_fast = speed["child"] >= (1 - SLOWER) * speed["sibling"]
    claims = {"child better than sibling": accuracy["child"] > accuracy["sibling"]} if as_fast and items else {}
    return Measured(columns, claims, "" if as_fast else "The child is slower than the sibling: search at its speed.")


TITLE = "Table 5: a smaller sibling at equal speed"
TABLE = Table("table_05", TITLE, "accuracy", PAPER, "by model", measure, ("run", "sibling"))

if __name__ == "__main__":
    TABLE.main()
