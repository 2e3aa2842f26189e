"""Sizes and formats searched together, against formats alone, sizes alone and the parent in one format throughout.

Reads a run with formats, scores and costs (`puzzle run recipes/quickstart.yaml --to search-architecture`). At each
speed-up over the parent in its own precision, by the cost table, three programs are solved over the same tables:

    joint         every variant in every format
    formats       the parent's own sub-blocks, in every format
    architecture  every variant in the parent's precision

The child of each is assembled, refitted and rounded on 8,192 calibration tokens, and compared with the parent on
validation text; then it is timed in llama.cpp next to the parent. The parent in each format is treated likewise, and
the file that the parent was read from is timed too.
With --distil every child is then distilled with the recipe's GKD tokens, formats straight through.

Children are kept in runs/benchmark-precision, so a second call goes on. results/precision.json has, by way and
speed-up, kl_, top1_, kl_distilled_, speedup_predicted_, speedup_measured_ and bytes_.

python benchmarks/precision.py [--distil] [--only WAY] [RUN] [SPEEDUP ...]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import gguf
from results import save

from puzzle_nas.architecture import Architecture, Choice
from puzzle_nas.artifacts import RunFolder, complete_folder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.refinement import REFIT_TOKENS
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import find_checkpoint, load_model, load_parent, save_model
from puzzle_nas.formats.stored import read_matrices, write_matrices
from puzzle_nas.library import assemble
from puzzle_nas.machine import describe, machine_of, usable_cores
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.refitting import Goals, refit

SPEEDUPS = (1.25, 1.5, 2.0, 2.5)
KEPT = Path("runs/benchmark-precision")
TIMING_REPEATS = 7


class Children:
    """Children of one run, each made, compared and timed once."""

    def __init__(self, run: RunFolder):
        self.run, self.recipe = run, open_run(run)
        self.parent = load_parent(self.recipe, run)
        self.found = ArchitectureSearch.load(self.recipe, run)
        calibration = load_tokens(run, "calibration")
        self.calibration = calibration[: max(1, REFIT_TOKENS // calibration.shape[1])]
        self.validation = ParentReference(self.parent, load_tokens(run, "validation"))
        self.engine = ENGINES[self.recipe.engine]
        self.goals: Goals = {}

    def searched(self, way: str, speedup: float) -> Architecture:
        """The best architecture of one way by summed scores.

        Raises:
            InfeasibleError: it cannot be made so fast.
        """

        def allowed(choice: Choice) -> bool:
            layer, specs = choice
            if way == "formats":
                return all(spec.plain == self.found.space.own(layer, spec.slot) for spec in specs)
            return way == "joint" or all(spec.format is None for spec in specs)

        search = replace(self.found, scores={c: score for c, score in self.found.scores.items() if allowed(c)})
        settings = self.recipe.search
        (solution,) = search.solve({"speedup": speedup}, settings.gap, settings.time_limit_seconds)
        return search.architecture(solution)

    def folder(self, architecture: Architecture) -> Path:
        """Where a child is kept."""
        return KEPT / fingerprint([str(self.run), architecture.to_list()])

    def made(self, architecture: Architecture) -> dict[str, float]:
        """Figures of a child before it is distilled."""
        folder = self.folder(architecture)
        if not (folder / "made.json").exists():
            child = assemble(self.run, self.parent, architecture)
            matrices = refit(self.parent, child, self.calibration, self.recipe.refit.ridge_tokens, goals=self.goals)
            with complete_folder(folder / "start") as partial:
                save_model(child, None, partial)
                write_matrices(matrices, partial)
            costs, compared = self.found.costs, self.validation.compare(child)
            write_json(
                folder / "made.json",
                {
                    "kl": compared.kl_nats,
                    "top1": compared.top1_agreement,
                    "speedup_predicted": costs.mix_ms(self.found.parent) / costs.mix_ms(architecture),
                    "bytes": costs.memory_bytes(architecture),
                },
            )
        return read_json(folder / "made.json")

    def timed(self, architecture: Architecture) -> float:
        """The measured speed-up over the parent in its own precision."""
        path = self.folder(architecture) / "timed.json"
        if not path.exists():
            child = load_model(self.folder(architecture) / "start", machine_of(self.recipe))
            with self.engine.loaded({"parent": self.parent, "child": child}, KEPT / "scratch") as loaded:
                scenarios, steps = self.found.costs.scenarios, self.recipe.costs.decode_steps_measured
                ratios = speedups(self.engine, loaded, scenarios, TIMING_REPEATS, steps)
            write_json(path, {"speedup_measured": statistics.median(ratios), "repeats": ratios})
        return read_json(path)["speedup_measured"]

    def timed_file(self) -> dict[str, float]:
        """The same of the GGUF file that the parent was read from, nothing where it was none; its KL is 0."""
        source = find_checkpoint(self.recipe.parent, self.run / "download")
        if not isinstance(source, Path) or source.suffix != ".gguf":
            return {}
        path = KEPT / "parent_file" / "timed.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            link = path.with_name("model.gguf")
            link.unlink(missing_ok=True)
            link.symlink_to(source.resolve())
            scenarios, steps = self.found.costs.scenarios, self.recipe.costs.decode_steps_measured
            with (
                self.engine.loaded({"parent": self.parent}, KEPT / "scratch") as loaded,
                self.engine.load(path.parent, "bfloat16", usable_cores()) as file,
            ):
                models = {"parent": loaded["parent"], "child": file}
                ratios = speedups(self.engine, models, scenarios, TIMING_REPEATS, steps)
            tensors = gguf.GGUFReader(source).tensors
            found = {"speedup_measured": statistics.median(ratios), "bytes": sum(int(t.n_bytes) for t in tensors)}
            write_json(path, found)
        return read_json(path)

    def distilled(self, architecture: Architecture) -> float:
        """KL on validation after GKD."""
        path = self.folder(architecture) / "distilled.json"
        if not path.exists():
            start = self.folder(architecture) / "start"
            run = RunFolder(self.folder(architecture) / "run")
            for name in ("data", "parent", "parent.json", "recipe.yaml"):
                if not (run / name).exists():
                    run.path.mkdir(parents=True, exist_ok=True)
                    (run / name).symlink_to((self.run / name).resolve())
            child = load_model(start, machine_of(self.recipe))
            training = Training(self.recipe, run, LiveParent(self.parent), child, read_matrices(start))
            training.train()
            write_json(path, {"kl_distilled": self.validation.compare(training.finish().eval()).kl_nats})
        return read_json(path)["kl_distilled"]


def main() -> None:
    """Go through all ways and speeds, printing and saving as it goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--only", action="append", choices=("joint", "formats", "architecture"))
    parser.add_argument("run", nargs="?", default="runs/quickstart", type=Path)
    parser.add_argument("speedups", nargs="*", type=float, default=SPEEDUPS)
    asked = parser.parse_args()
    children = Children(RunFolder(asked.run))
    machine = describe(machine_of(children.recipe))
    figures: dict[str, float] = {}

    parents = children.found.space.quantised_parents
    searched = {f"uniform_{name.removeprefix('parent@')}": architecture for name, architecture in parents.items()}
    for speedup in asked.speedups:
        for way in asked.only or ("joint", "formats", "architecture"):
            try:
                searched[f"{way}_{speedup:g}x"] = children.searched(way, speedup)
            except InfeasibleError as error:
                print(f"{way}_{speedup:g}x: {error}", flush=True)

    def note(name: str, found: dict[str, float]) -> None:
        figures.update({f"{key}_{name}": value for key, value in found.items()})
        print(f"{name:24s} {', '.join(f'{key} {value:.4g}' for key, value in found.items())}", flush=True)
        save("precision", figures, machine)

    for name, architecture in searched.items():
        note(name, children.made(architecture))
        if asked.distil:
            note(name, {"kl_distilled": children.distilled(architecture)})
    # Times are taken in one go, of one child after the other next to the parent.
    for name, architecture in searched.items():
        note(name, {"speedup_measured": children.timed(architecture)})
    if found := children.timed_file():
        note("parent_file", found)


if __name__ == "__main__":
    main()
