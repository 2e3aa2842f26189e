"""What the text of a run does to its child, on that text and on others: library text, text of many kinds, samples.

Runs that differ in their text alone, from calibration to GKD, with as many tokens:

    runs/quickstart  Python's library    puzzle run recipes/quickstart.yaml
    runs/general     text of many kinds  puzzle run benchmarks/general.yaml
    runs/half        half Python's library, half what the parent writes
                     puzzle run benchmarks/general.yaml --run-dir runs/half data.sample_tokens=90000 \\
                         'data.sources=[{source: python-stdlib}, {source: parent-samples}]'

KL(parent || child) in nats of the child assembled, refitted and distilled, on the quickstart's validation split and on
12,288 tokens of general text (../shared/data/validation). python benchmarks/data_sources.py
"""

from __future__ import annotations

from general_text import general_reference
from results import save

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.training.comparison import ParentReference

RUNS = {"python_stdlib": "quickstart", "general_text": "general", "stdlib_1_samples_1": "half"}
CHILDREN = {"assembled": "child", "refitted": "child-refit", "distilled": "child-gkd"}


def main() -> None:
    """Print KL of every child on both kinds of text, and keep the figures."""
    library = RunFolder("runs/quickstart")
    machine = machine_of(open_run(library))
    references = {
        "general": general_reference(library),
        "library": ParentReference(load_parent(library)[0], load_tokens(library, "validation")),
    }
    figures: dict[str, float] = {}
    print(f"{'text of the run':20s}{'child':12s}" + "".join(f"{f'KL, {kind} text':>24s}" for kind in references))
    for name, run in RUNS.items():
        for stage, folder in CHILDREN.items():
            child = load_model(RunFolder(f"runs/{run}") / folder, machine)
            found = {kind: reference.compare(child) for kind, reference in references.items()}
            for kind, measured in found.items():
                figures[f"{kind}_kl_nats.{name}.{stage}"] = measured.kl_nats
                figures[f"{kind}_kl_standard_error.{name}.{stage}"] = measured.kl_nats_standard_error
            cells = (f"{m.kl_nats:.3f} +- {m.kl_nats_standard_error:.3f}" for m in found.values())
            print(f"{name:20s}{stage:12s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)
    print("Written to", save("data_sources", figures))


if __name__ == "__main__":
    main()
