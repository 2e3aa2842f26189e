"""Puzzle against what people would do instead, at the same predicted speed, of the same parent, with the same text.

puzzle           our search (measured candidates, rounds of refinement), refit, GKD
greedy           the library's variants, chosen layer by layer (Puzzle, table 11)
random           the library's variants, drawn at random: the median of five draws
block_influence  whole layers removed, those that turn their input least first (ShortGPT)
contiguous       whole layers removed, the run of them that harms KL least (Minitron, depth)
width            every FFN as narrow as the next, by Channel Contribution (Minitron, width)
width_refitted   the same with our choice of channels and least squares

Whole layers reach only some speeds; the one nearest to 1.25x, 1.5x and 2x is the limit of every method. FFN widths
are costed on straight lines between those of the cost table and a timed width of 32. Where no FFN width is fast enough,
the fewest whole layers that leave a quarter of the width go as well, by block influence.

Text: `puzzle`, `greedy` and `random` get their own tokens of GKD beside the library's calibration and BLD text; the
others, which need no library, get all three together as GKD. Chosen on selection, reported on validation. Of whole
layers and of widths the better way on selection before GKD counts: `depth_pruned`, `width_pruned`.

RUN is `general` (text of many kinds: puzzle run benchmarks/general.yaml) or `general_gpu` (a hundred times the tokens,
on a GPU: benchmarks/general_gpu.yaml; its costs are those of runs/torch). Text and tasks are of ../shared. Children are
kept in runs/benchmark-alternatives/RUN, so a second call goes on. Steps are `make`, then `tasks` (multiple-choice
accuracy), `general` (KL on text of many kinds), `measure` (times: wants a quiet machine) and `report`; each ends with
the table of what is there.

Figures in results/alternatives.json and alternatives_gpu.json, without AMX in files of their own.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.alternative_starts import SPEEDUPS, Starts
from benchmarks.common import (
    CONTINUATIONS,
    TASK_ITEMS,
    UNREAD_CONTINUATIONS,
    by_arithmetic,
    general_reference,
    linked,
    opened,
    right_answers,
    save,
    task_items,
)
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import timed_steps
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError, PuzzleError
from puzzle_nas.estimates import estimate
from puzzle_nas.families import load_model, load_tokenizer, parent_checkpoint, probe_model, save_model
from puzzle_nas.machine import machine_of
from puzzle_nas.pipeline import open_run
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent


@dataclass(frozen=True)
class Budget:
    """Of one run."""

    results: str
    """Where figures are kept."""
    own_tokens: int = 49_152
    """GKD of the methods that use the library."""
    task: Path = CONTINUATIONS
    """On whose items accuracy is measured."""
    rates: tuple[float, ...] = ()
    """Learning rates of GKD to try first; none means the recipe's."""
    trial_tokens: int = 0
    """On which; the rate that ends lowest on selection is used. They count for no method."""


BUDGETS = {
    "general": Budget("alternatives"),
    "general_gpu": Budget("alternatives_gpu", 6_291_456, UNREAD_CONTINUATIONS, (3e-4, 1e-3), 786_432),
}
FROM_LIBRARY = ("puzzle", "greedy", "random")
PAIRS = {"depth_pruned": ("block_influence", "contiguous"), "width_pruned": ("width_refitted", "width")}
TIMING_REPEATS = 5

Facts = dict[str, Any]


class Children:
    """Of one run, each made, distilled and measured once."""

    def __init__(self, name: str) -> None:
        self.base, self.budget = RunFolder(f"runs/{name}"), BUDGETS[name]
        self.folder = Path("runs/benchmark-alternatives") / name

    def place(self, method: str, speedup: float) -> Path:
        """Where a child is kept."""
        return self.folder / f"{speedup}x" / method

    def started(self, starts: Starts, method: str, speedup: float) -> Facts:
        """Make a child and evaluate it before GKD; the facts."""
        run = linked(self.base, self.place(method, speedup))
        if not (run / "start.json").exists():
            begin = time.process_time()
            start = getattr(starts, method)(speedup)
            seconds = time.process_time() - begin
            with complete_folder(run / "start") as partial:
                save_model(start.model, None, partial)
            facts = {
                "architecture": start.architecture.to_list(),
                "speedup_predicted": starts.speedup(start.architecture),
                "parameters": sum(p.numel() for p in start.model.parameters()),
                "core_seconds_to_start": seconds,
                "selection_kl_nats_before_gkd": starts.selection.compare(start.model).kl_nats,
                "before_gkd": starts.validation.compare(start.model).to_dict(),
                **start.facts,
            }
            write_json(run / "start.json", facts)
        return read_json(run / "start.json")

    def distil(self, starts: Starts, method: str, speedup: float) -> None:
        """Distil and evaluate a child that has been started."""
        place, budget = self.place(method, speedup), self.budget
        if (place / "result.json").exists():
            return

        def gkd(folder: Path, **settings) -> Training:
            recipe = starts.recipe.model_copy(update={"gkd": starts.recipe.gkd.model_copy(update=settings)})
            start = load_model(place / "start", machine_of(recipe))
            return Training(recipe, linked(self.base, folder), LiveParent(starts.parent), start)

        tokens = budget.own_tokens
        if method not in FROM_LIBRARY:
            tokens += starts.recipe.bld.tokens + starts.calibration.numel()
        ends: dict[float, float] = {}
        for rate in budget.rates:
            trial = gkd(place / f"scratch/rate_{rate}", tokens=budget.trial_tokens, learning_rate=rate)
            trial.train()
            ends[rate] = trial.curve[-1]["selection_kl_nats"]
            # Its memory is wanted.
            del trial
        rate = min(ends, key=ends.__getitem__) if ends else starts.recipe.gkd.learning_rate
        begin = time.process_time()
        training = gkd(place, tokens=tokens, learning_rate=rate)
        resumed_at = max((int(path.name[-8:]) for path in training.state_folder.glob("step_????????")), default=0)
        training.train()
        # A resumed distillation counts as if all its steps had taken what the last ones took.
        seconds = (time.process_time() - begin) * len(training.batches) / max(1, len(training.batches) - resumed_at)
        child = training.finish().eval()
        with complete_folder(place / "child") as partial:
            save_model(child, load_tokenizer(parent_checkpoint(self.base)), partial)
        after = {
            "gkd_tokens": tokens,
            "learning_rate": rate,
            "selection_kl_nats_by_learning_rate_tried": ends,
            "core_seconds_of_gkd": seconds,
            "selection_kl_nats": training.best["selection_kl_nats"],
            "curve": training.curve,
            "after_gkd": starts.validation.compare(child).to_dict(),
        }
        write_json(place / "result.json", after)
        shutil.rmtree(place / "scratch")

    def make(self, speedup_list: list[float], only: str | None) -> None:
        """Make, distil and evaluate, method by method."""
        starts = Starts(self.base, self.folder)
        methods = [m for m in FROM_LIBRARY if only in (None, m)]
        pairs = [ways for label, ways in PAIRS.items() if only in (None, label)]
        for speedup in speedup_list:
            found: dict[str, float] = {}
            for method in (*methods, *(way for ways in pairs for way in ways)):
                try:
                    facts = self.started(starts, method, speedup)
                except InfeasibleError as error:
                    print(f"{speedup}x {method}: {error}", flush=True)
                    continue
                found[method] = facts["selection_kl_nats_before_gkd"]
                print(f"{speedup}x {method:16s} KL before GKD {facts['before_gkd']['kl_nats']:.4f}", flush=True)
            for method in [m for m in methods if m in found] + [better(found, ways) for ways in pairs]:
                self.distil(starts, method, speedup)
                print(f"{speedup}x {method:16s} distilled", flush=True)

    def distilled(self) -> list[Path]:
        """Folders of all children that are finished."""
        return [path.parent for path in sorted(self.folder.glob("*x/*/result.json"))]

    def general(self) -> None:
        """KL of every distilled child on books, mail, speeches and the like, of each kind as many tokens."""
        reference, machine = general_reference(self.base), machine_of(open_run(self.base))
        for folder in self.distilled():
            if not (folder / "general.json").exists():
                found = reference.compare(load_model(folder / "child", machine))
                write_json(folder / "general.json", {"general": found.to_dict()})

    def tasks(self) -> None:
        """Task accuracy of every distilled child and of the parent."""
        (recipe, parent), items = opened(self.base), task_items(self.budget.task, TASK_ITEMS)
        tokenizer = load_tokenizer(parent_checkpoint(self.base))
        made_from = fingerprint([item.key.hex() for item in items])
        for folder in (self.folder, *self.distilled()):
            path = folder / f"tasks/{self.budget.task.stem}.json"
            if not path.exists() or read_json(path)["made_from"] != made_from:
                model = parent if folder == self.folder else load_model(folder / "child", machine_of(recipe))
                write_json(path, {"made_from": made_from, "right": right_answers(model, tokenizer, items)})

    def measure(self) -> None:
        """Time every distilled child next to the parent, on the run's engine."""
        recipe, parent = opened(self.base)
        engine, scenarios = ENGINES[recipe.engine], ArchitectureSearch.load(recipe, self.base).costs.scenarios
        for folder in self.distilled():
            if not (folder / "measured.json").exists():
                architecture = Architecture.from_list(read_json(folder / "start.json")["architecture"])
                models = {"parent": parent, "child": probe_model(parent, architecture)}
                with engine.loaded(models, self.folder / "scratch") as loaded:
                    ratios = speedups(engine, loaded, scenarios, TIMING_REPEATS, timed_steps(recipe.engine))
                facts = {"speedup_measured": statistics.median(ratios), "speedup_by_repeat": sorted(ratios)}
                write_json(folder / "measured.json", facts)

    def facts(self, speedup: float) -> dict[str, Facts]:
        """All that is known of the children of a speed-up, by method."""
        found: dict[str, Facts] = {}
        for path in sorted((self.folder / f"{speedup}x").glob("*/start.json")):
            facts: Facts = {"general": {}}
            for name in ("start.json", "result.json", "measured.json", "general.json"):
                if (path.parent / name).exists():
                    facts |= read_json(path.parent / name)
            found[path.parent.name] = facts | {"right": answered(path.parent)}
        return found

    def report(self) -> None:
        """Print the table of what is there, and keep it."""
        figures: dict[str, float | None] = {"gkd_tokens_of_library_methods": self.budget.own_tokens}
        columns = ("pred.", "meas.", "KL before", "KL", "+-", "ppl", "general KL", "core s")
        print(f"\n{'':6s}{'method':32s}" + "".join(f"{column:>11s}" for column in columns) + "  tasks")
        for speedup in sorted(SPEEDUPS):
            children = self.facts(speedup)
            done = {m: f for m, f in children.items() if "after_gkd" in f}
            labels = {m: m for m in FROM_LIBRARY if m in done}
            kl = {m: f["selection_kl_nats"] for m, f in done.items()}
            labels |= {label: better(kl, ways) for label, ways in PAIRS.items() if any(way in done for way in ways)}
            for label, method in labels.items():
                name, facts = f"{label}_{speedup}x", done[method]
                after, general = facts["after_gkd"], facts["general"]
                seconds = facts["core_seconds_to_start"] + facts["core_seconds_of_gkd"]
                row = {
                    f"speedup_predicted_{name}": facts["speedup_predicted"],
                    f"speedup_measured_{name}": facts.get("speedup_measured"),
                    f"kl_{label}_before_gkd_{speedup}x": facts["before_gkd"]["kl_nats"],
                    f"kl_{name}": after["kl_nats"],
                    f"kl_standard_error_{name}": after["kl_nats_standard_error"],
                    f"perplexity_{name}": after["perplexity"],
                    f"kl_general_{name}": general.get("kl_nats"),
                    f"core_seconds_{name}": round(seconds, 1),
                }
                shown = "".join(f"{'' if value is None else format(value, '.4g'):>11s}" for value in row.values())
                row |= {f"gkd_tokens_{name}": facts["gkd_tokens"], f"parameters_{name}": facts["parameters"]}
                row[f"kl_general_standard_error_{name}"] = general.get("kl_nats_standard_error")
                for task, right in facts["right"].items():
                    row[f"accuracy_{task}_{name}"] = estimate(right)["mean"]
                    shown += f"  {task} {estimate(right)['mean']:.3f}"
                    ours = done.get("puzzle", {"right": {}})["right"].get(task)
                    if label != "puzzle" and ours is not None:
                        ahead = estimate(np.subtract(ours, right))
                        row[f"accuracy_{task}_puzzle_less_{name}"] = ahead["mean"]
                        row[f"accuracy_{task}_puzzle_less_{name}_standard_error"] = ahead["standard_error"]
                        shown += f" (puzzle {ahead['mean']:+.3f} +- {ahead['standard_error']:.3f})"
                figures |= {key: value for key, value in row.items() if value is not None}
                print(f"{speedup:.2f}x {label if label == method else f'{label} ({method})':32s}{shown}")
            for method, facts in children.items():
                figures.setdefault(f"kl_{method}_before_gkd_{speedup}x", facts["before_gkd"]["kl_nats"])
        for task, right in answered(self.folder).items():
            figures |= {f"accuracy_{task}_parent": estimate(right)["mean"], f"items_{task}": len(right)}
            print(f"parent: {task} {estimate(right)['mean']:.3f}, {len(right)} items")
        print("Written to", save(by_arithmetic(self.budget.results), figures))


def better(kl: dict[str, float], ways: tuple[str, str]) -> str:
    """The way with the lower KL on selection."""
    return min((way for way in ways if way in kl), key=kl.__getitem__)


def answered(folder: Path) -> dict[str, list[float]]:
    """By task, for each item whether it was answered right."""
    return {path.stem: read_json(path)["right"] for path in sorted((folder / "tasks").glob("*.json"))}


def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help=", ".join(BUDGETS))],
    step: str = "make",
    speedup: list[float] | None = None,
    only: Annotated[str | None, typer.Option(metavar="METHOD", help=", ".join((*FROM_LIBRARY, *PAIRS)))] = None,
) -> None:
    """See above."""
    if run not in BUDGETS:
        raise PuzzleError(f"There are no budgets for '{run}'; runs: {', '.join(BUDGETS)}.")
    children = Children(run)
    steps: dict[str, Callable[[], None]] = {
        "make": lambda: children.make(speedup or list(SPEEDUPS), only),
        "tasks": children.tasks,
        "general": children.general,
        "measure": children.measure,
        "report": lambda: None,
    }
    if step not in steps:
        raise PuzzleError(f"There is no step '{step}'; steps: {', '.join(steps)}.")
    steps[step]()
    children.report()
