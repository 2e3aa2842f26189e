"""Sizes and formats searched together, against what people would do instead, at equal speed.

Reads a run with formats, scores and costs (`puzzle run recipes/quickstart.yaml --to search-architecture`). At each
speed-up over the parent in its own precision, by the cost table, three programs are solved over the same tables:

    joint         every variant in every format
    formats       the parent's own sub-blocks, in every format
    architecture  every variant in the parent's precision

`search` is what `search.effort: normal` makes of the first: children are assembled, refitted and measured on selection,
some of them without a run of layers, and scores taken again around the best.

Two rules are followed, in each format throughout, of which the one with the lowest KL on selection counts:

    depth         as few neighbouring layers removed as are enough, those without which KL on scoring text is lowest
    width         every FFN as narrow as is enough, of the library's widths

The child of each is assembled, refitted and rounded on 8,192 calibration tokens, and compared with the parent on
validation text; then it is timed on the run's engine next to the parent. `uniform`, the parent in each format, is
treated likewise, and in llama.cpp the file that the parent was read from is timed too.

With --megabytes N children of so many bytes are asked for instead of speeds (results/sizes.json).
With --tokens N every child is distilled with so many tokens, at that of --rate whose child is nearest on selection.
With --items N it answers N of the multiple-choice items of `python -m benchmarks continuations`.

Children are kept in runs/benchmark-precision, so a second call goes on. results/precision.json, with --tokens
equal_speed.json (with another run's name, NAME_RUN.json) has, by way and speed-up, and by tokens where
distilled, kl_, top1_, bytes_, learning_rate_, accuracy_continuations_, speedup_predicted_ and speedup_measured_.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import gguf
import typer
from transformers import PreTrainedModel

from benchmarks.common import CONTINUATIONS, RunArgument, linked, opened, right_answers, save, task_items
from puzzle_nas import engines
from puzzle_nas.architecture import Architecture, Choice
from puzzle_nas.artifacts import RunFolder, complete_folder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import timed_steps
from puzzle_nas.choosing.refinement import REFIT_TOKENS, Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.effort import EFFORTS
from puzzle_nas.engines import LlamaCppEngine
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import find_checkpoint, load_model, load_tokenizer, parent_checkpoint, save_model
from puzzle_nas.formats.stored import FILE, read_matrices, write_matrices
from puzzle_nas.library import assemble, rounded_ends_of
from puzzle_nas.machine import describe, machine_of, usable_cores
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.specs import GatedFFN
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent
from puzzle_nas.training.refitting import Goals, refit

SPEEDUPS = (1.25, 1.5, 2.0, 2.5)
PROGRAMS, RULES = ("joint", "formats", "architecture"), ("depth", "width")
WAYS = ("uniform", "search", *PROGRAMS, *RULES)
KEPT = Path("runs/benchmark-precision")
TIMING_REPEATS = 7


class Children:
    """Children of one run, each made, compared and timed once."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.recipe, self.parent = opened(run)
        self.found = ArchitectureSearch.load(self.recipe, run)
        calibration = load_tokens(run, "calibration")
        self.calibration = calibration[: max(1, REFIT_TOKENS // calibration.shape[1])]
        self.validation = ParentReference(self.parent, load_tokens(run, "validation"))
        self.selection = ParentReference(self.parent, load_tokens(run, "selection"))
        splits = {split: load_tokens(run, split) for split in ("calibration", "scoring", "selection")}
        self.trials = Trials(run, self.parent, self.recipe, splits, self.found.library)
        self.engine = engines.ENGINES[self.recipe.engine]
        self.goals: Goals = {}

    def searched(self, way: str, limits: dict[str, float]) -> Architecture:
        """The best architecture of a program by summed scores, or of `search`.

        Raises:
            InfeasibleError: nothing meets the limits.
        """
        if way == "search":
            searches = self.found.by_either_loss(self.recipe, self.run)
            return Refinement(searches, EFFORTS["normal"], self.trials).best(limits)

        def allowed(choice: Choice) -> bool:
            layer, specs = choice
            if way == "formats":
                return all(spec.plain == self.found.space.own(layer, spec.slot) for spec in specs)
            return way == "joint" or all(spec.format is None for spec in specs)

        search = replace(self.found, scores={c: score for c, score in self.found.scores.items() if allowed(c)})
        (solution,) = search.solve(limits)
        return search.architecture(solution)

    def by_rule(self, way: str, limits: dict[str, float]) -> Architecture:
        """The best child of one rule on the selection split.

        Raises:
            InfeasibleError: it makes none that meets the limits.
        """
        space, rule = self.found.space, self._without_layers if way == "depth" else self._narrowed
        starts = [space.parent, *space.quantised_parents.values()]
        children = [child for child in (rule(start, limits) for start in starts) if child is not None]
        if not children:
            raise InfeasibleError("No such child meets the limits.")
        return min(children, key=lambda child: self.made(child)["selection_kl"])

    def _without_layers(self, start: Architecture, limits: dict[str, float]) -> Architecture | None:
        number = len(start.layers)
        for removed in range(number):
            runs = [range(first, first + removed) for first in range(number - removed + 1)] if removed else [range(0)]
            if self.found.meets(limits, start.without(runs[0])):
                return start.without(self.trials.best_run(runs) if removed else runs[0])
        return None

    def _narrowed(self, start: Architecture, limits: dict[str, float]) -> Architecture | None:
        widths = {spec.intermediate_size for _, _, spec in self.found.space if isinstance(spec, GatedFFN)}
        for width in sorted(widths, reverse=True):
            child = start
            for layer, _, spec in start:
                if isinstance(spec, GatedFFN):
                    child = child.replaced(layer, GatedFFN(width, slot=spec.slot, format=spec.format))
            if self.found.meets(limits, child):
                return child
        return None

    def folder(self, architecture: Architecture) -> Path:
        """Where a child is kept."""
        return KEPT / fingerprint([str(self.run), architecture.to_list()])

    def made(self, architecture: Architecture) -> dict[str, float]:
        """Figures of a child before it is distilled."""
        folder = self.folder(architecture)
        if not (folder / "made.json").exists():
            child = assemble(self.run, self.parent, architecture)
            ends = rounded_ends_of(self.run, self.parent, architecture)
            matrices = refit(self.parent, child, self.calibration, goals=self.goals, already=ends)
            with complete_folder(folder / "start") as partial:
                save_model(child, None, partial)
                write_matrices(matrices, partial / FILE)
            costs, compared = self.found.costs, self.validation.compare(child)
            figures = {"kl": compared.kl_nats, "top1": compared.top1_agreement}
            figures["selection_kl"] = self.selection.compare(child).kl_nats
            figures["speedup_predicted"] = costs.mix_ms(self.found.parent) / costs.mix_ms(architecture)
            write_json(folder / "made.json", figures | {"bytes": costs.memory_bytes(architecture)})
        return read_json(folder / "made.json")

    def ratios(self, models: Mapping[str, Any]) -> list[float]:
        """Speed-ups of the child over the parent, one for each repeat."""
        scenarios, steps = self.found.costs.scenarios, timed_steps(self.recipe.engine)
        return engines.speedups(self.engine, models, scenarios, TIMING_REPEATS, steps)

    def timed(self, architecture: Architecture) -> float:
        """The measured speed-up over the parent in its own precision."""
        path = self.folder(architecture) / "timed.json"
        if not path.exists():
            child = load_model(self.folder(architecture) / "start", machine_of(self.recipe))
            with self.engine.loaded({"parent": self.parent, "child": child}, KEPT / "scratch") as loaded:
                ratios = self.ratios(loaded)
            write_json(path, {"speedup_measured": statistics.median(ratios), "repeats": ratios})
        return read_json(path)["speedup_measured"]

    def timed_file(self) -> dict[str, float]:
        """The same of the GGUF file that the parent was read from, nothing where it was none; its KL is 0."""
        source = find_checkpoint(self.recipe.parent, self.run / "download")
        if not isinstance(source, Path) or source.suffix != ".gguf" or not isinstance(self.engine, LlamaCppEngine):
            return {}
        path = KEPT / "parent_file" / "timed.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            link = path.with_name("model.gguf")
            link.unlink(missing_ok=True)
            link.symlink_to(source.resolve())
            with (
                self.engine.loaded({"parent": self.parent}, KEPT / "scratch") as loaded,
                self.engine.load(path.parent, "bfloat16", usable_cores()) as file,
            ):
                ratios = self.ratios({"parent": loaded["parent"], "child": file})
            tensors = gguf.GGUFReader(source).tensors
            found = {"speedup_measured": statistics.median(ratios), "bytes": sum(int(t.n_bytes) for t in tensors)}
            write_json(path, found)
        return read_json(path)

    def distilled(self, architecture: Architecture, tokens: int, rate: float, items: int) -> dict[str, float]:
        """KL on selection and validation after GKD, and the share of so many items that are answered."""
        path = self.folder(architecture) / f"distilled_{tokens}_{rate:g}_{items}.json"
        if not path.exists():
            start = self.folder(architecture) / "start"
            run = linked(self.run, self.folder(architecture) / f"run_{tokens}_{rate:g}")
            gkd = self.recipe.gkd.model_copy(update={"tokens": tokens, "learning_rate": rate})
            recipe, child = self.recipe.model_copy(update={"gkd": gkd}), load_model(start, machine_of(self.recipe))
            training = Training(recipe, run, LiveParent(self.parent), child, read_matrices(start / FILE))
            training.train()
            distilled = training.finish().eval()
            figures = {"selection_kl": training.best["selection_kl_nats"], "learning_rate": rate}
            figures["kl"] = self.validation.compare(distilled).kl_nats
            write_json(path, figures | self.accuracy(distilled, items))
        return read_json(path)

    def answers(self, architecture: Architecture, items: int) -> dict[str, float]:
        """The share of the first so many items that a child answers before it is distilled."""
        path = self.folder(architecture) / f"answers_{items}.json"
        if not path.exists():
            child = load_model(self.folder(architecture) / "start", machine_of(self.recipe))
            write_json(path, self.accuracy(child, items))
        return read_json(path)

    def accuracy(self, model: PreTrainedModel, items: int) -> dict[str, float]:
        """The share of the first so many items that a model answers; nothing of none."""
        if not items:
            return {}
        tokenizer = load_tokenizer(parent_checkpoint(self.run))
        right = right_answers(model, tokenizer, task_items(CONTINUATIONS, items))
        return {"accuracy_continuations": statistics.mean(right)}


def main(
    run: RunArgument = Path("runs/quickstart"),
    speedups: Annotated[list[float] | None, typer.Argument(metavar="[SPEEDUP]...")] = None,
    megabytes: Annotated[list[float] | None, typer.Option(help="Ask for so small children.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Distil every child with so many tokens.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates to try; 1e-4 by default.")] = None,
    items: Annotated[int, typer.Option(help="So many multiple-choice items are answered.")] = 0,
    only: Annotated[list[str] | None, typer.Option(metavar="WAY", help=", ".join(WAYS))] = None,
) -> None:
    """Go through all ways and speeds, printing and saving as it goes."""
    children = Children(RunFolder(run))
    machine = describe(machine_of(children.recipe))
    figures: dict[str, float] = {}
    name_of_results = "equal_speed" if tokens else "sizes" if megabytes else "precision"
    name_of_results += "" if run.name == "quickstart" else f"_{run.name}"
    ways = only or WAYS
    parents = children.found.space.quantised_parents if "uniform" in ways else {}
    searched = {f"uniform_{name.removeprefix('parent@')}": architecture for name, architecture in parents.items()}
    asked = {f"{speedup:g}x": {"speedup": speedup} for speedup in speedups or (() if megabytes else SPEEDUPS)}
    asked |= {f"{size:g}mb": {"memory_bytes": 1e6 * size} for size in megabytes or ()}
    for (limit, limits), way in itertools.product(asked.items(), (way for way in ways if way != "uniform")):
        try:
            find = children.by_rule if way in RULES else children.searched
            searched[f"{way}_{limit}"] = find(way, limits)
        except InfeasibleError as error:
            print(f"{way}_{limit}: {error}", flush=True)

    def note(name: str, found: dict[str, float]) -> None:
        figures.update({f"{key}_{name}": value for key, value in found.items()})
        print(f"{name:24s} {', '.join(f'{key} {value:.4g}' for key, value in found.items())}", flush=True)
        save(name_of_results, figures, machine)

    if items:
        note("parent", children.accuracy(children.parent, items))
    for name, architecture in searched.items():
        note(name, children.made(architecture))
        if items and not tokens:
            note(name, children.answers(architecture, items))
        for budget in tokens or ():
            tried = [children.distilled(architecture, budget, at, items) for at in rate or (1e-4,)]
            note(f"{name}_{budget}", min(tried, key=lambda found: found["selection_kl"]))
    # Times are taken in one go, of one child after the other next to the parent.
    for name, architecture in searched.items():
        note(name, {"speedup_measured": children.timed(architecture)})
    if found := children.timed_file():
        note("parent_file", found)
