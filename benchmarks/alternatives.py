"""Puzzle against what people would do instead, on the same parent at the same predicted speed, with the same text.

    puzzle          our search (measured candidates, two rounds of refinement), refit, GKD
    greedy          the library's variants, chosen layer by layer (Puzzle, table 11)
    random          the library's variants, drawn at random: the median of five draws
    block_influence whole layers removed, those that turn their input least first (ShortGPT)
    contiguous      whole layers removed, the run of them that harms KL least (Minitron, depth)
    width           every FFN as narrow as the next, by Channel Contribution (Minitron, width)
    width_refitted  the same with our choice of channels and least squares

Whole layers reach only some speeds; the one nearest to 1.25x, 1.5x and 2x is the limit of every method. FFN widths
are costed on straight lines between those of the cost table and a timed width of 32. Where no FFN width is fast enough,
the fewest whole layers that leave a quarter of the width go as well, by block influence.

Text: `puzzle`, `greedy` and `random` get their own tokens of GKD beside the library's calibration and BLD text; the
others, which need no library, get all three together as GKD. Chosen on selection, reported on validation.
`depth_pruned` and `width_pruned` are the better of their two ways on selection before GKD; with --both, each is
distilled and the better one afterwards counts.

Reads a run: RUN is `general` (text of many kinds: puzzle run benchmarks/general.yaml), `quickstart` (library text) or
`general_gpu` (a hundred times the tokens of `general`, on a GPU: benchmarks/general_gpu.yaml; the costs are those of
runs/torch). Children are kept in runs/benchmark-alternatives/RUN, so a second call goes on where one stopped;
figures in results/alternatives.json, alternatives_quickstart.json and alternatives_gpu.json, without AMX in files of
their own.

python benchmarks/alternatives.py RUN [--both] [--only METHOD] [SPEEDUP ...]   make and evaluate children
python benchmarks/alternatives.py RUN --report   print what is there
python benchmarks/alternatives.py RUN --tasks   multiple-choice accuracy of the children, where the files are
python benchmarks/alternatives.py RUN --general   their KL on text of many kinds, where the files are
python benchmarks/alternatives.py RUN --measure   time them beside the parent: wants a quiet machine
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from alternative_starts import SPEEDUPS, Place, Starts
from general_text import general_reference
from results import by_arithmetic, save
from task_accuracy import USED, items_of, right_answers

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.estimates import estimate
from puzzle_nas.families import load_model, load_parent, load_tokenizer, save_model
from puzzle_nas.families.loading import parent_checkpoint, probe_model
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
    evaluate_every_steps: int = 16
    """Between points of GKD's curve, the best of which counts."""
    task: str = "continuations"
    """On whose items accuracy is measured."""
    rates: tuple[float, ...] = ()
    """Learning rates that each method tries; none: the recipe's."""
    trial_tokens: int = 0
    """On which; the rate that ends lowest on selection is used. They count for no method."""


BUDGETS = {
    "general": Budget("alternatives"),
    "quickstart": Budget("alternatives_quickstart"),
    "general_gpu": Budget(
        "alternatives_gpu",
        own_tokens=6_291_456,
        evaluate_every_steps=128,
        task="continuations_unread",
        rates=(3e-4, 1e-3),
        trial_tokens=786_432,
    ),
}
FROM_LIBRARY = ("puzzle", "greedy", "random")
PAIRS = {"depth_pruned": ("block_influence", "contiguous"), "width_pruned": ("width_refitted", "width")}
TIMING_REPEATS = 5


def started(starts: Starts, method: str, speedup: float) -> dict:
    """Make a child and evaluate it before GKD; the facts."""
    run = starts.place.linked(starts.place.folder / f"{speedup}x" / method)
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


def gkd(starts: Starts, folder: Path, run: RunFolder, **settings) -> Training:
    """GKD of the child that has been started in `run`, ready to train.

    Args:
        folder: for what it keeps meanwhile.
        settings: that differ from the recipe's.
    """
    recipe = starts.recipe.model_copy(update={"gkd": starts.recipe.gkd.model_copy(update=settings)})
    start = load_model(run / "start", machine_of(recipe))
    return Training(recipe, starts.place.linked(folder), LiveParent(starts.parent), start)


def distilled(starts: Starts, method: str, speedup: float) -> dict:
    """Distil a child that has been started; all its facts."""
    facts, run = started(starts, method, speedup), RunFolder(starts.place.folder / f"{speedup}x" / method)
    if not (run / "result.json").exists():
        budget = BUDGETS[starts.place.name]
        tokens = budget.own_tokens
        if method not in FROM_LIBRARY:
            tokens += starts.recipe.bld.tokens + starts.calibration.numel()
        ends: dict[float, float] = {}
        for rate in budget.rates:
            trial = gkd(starts, run / f"scratch/rate_{rate}", run, tokens=budget.trial_tokens, learning_rate=rate)
            trial.train()
            ends[rate] = trial.curve[-1]["selection_kl_nats"]
            # Its memory is wanted.
            del trial
        rate = min(ends, key=ends.__getitem__) if ends else starts.recipe.gkd.learning_rate
        begin = time.process_time()
        every = budget.evaluate_every_steps
        training = gkd(starts, run.path, run, tokens=tokens, learning_rate=rate, evaluate_every_steps=every)
        resumed_at = max((int(path.name[-8:]) for path in training.state_folder.glob("step_????????")), default=0)
        training.train()
        # A resumed distillation counts as if all its steps had taken what the last ones took.
        seconds = (time.process_time() - begin) * len(training.batches) / max(1, len(training.batches) - resumed_at)
        child = training.finish().eval()
        with complete_folder(run / "child") as partial:
            save_model(child, load_tokenizer(parent_checkpoint(starts.base)), partial)
        after = {
            "gkd_tokens": tokens,
            "learning_rate": rate,
            "selection_kl_nats_by_learning_rate_tried": ends,
            "core_seconds_of_gkd": seconds,
            "selection_kl_nats": training.best["selection_kl_nats"],
            "curve": training.curve,
            "after_gkd": starts.validation.compare(child).to_dict(),
        }
        write_json(run / "result.json", after)
        shutil.rmtree(run / "scratch")
    return facts | read_json(run / "result.json")


def better(facts: dict[str, dict], ways: tuple[str, str], field: str) -> str:
    """The way with the lower KL on selection."""
    return min((way for way in ways if way in facts), key=lambda way: facts[way][field])


def make(place: Place, speedup_list: tuple[float, ...], both: bool, only: str | None) -> None:
    """Make, distil and evaluate; print a line for each child."""
    starts = Starts(place)
    methods = [m for m in FROM_LIBRARY if only in (None, m)]
    pairs = {label: ways for label, ways in PAIRS.items() if only in (None, label)}
    for speedup in speedup_list:
        found: dict[str, dict] = {}
        for method in (*methods, *(way for ways in pairs.values() for way in ways)):
            try:
                found[method] = started(starts, method, speedup)
            except InfeasibleError as error:
                print(f"{speedup}x {method}: {error}", flush=True)
                continue
            print(
                f"{speedup}x {method:16s} predicted {found[method]['speedup_predicted']:.3f}x  "
                f"KL before GKD {found[method]['before_gkd']['kl_nats']:.4f}",
                flush=True,
            )
        chosen = [m for m in methods if m in found]
        for ways in pairs.values():
            first = better(found, ways, "selection_kl_nats_before_gkd")
            chosen += ways if both else (first,)
        for method in chosen:
            facts = distilled(starts, method, speedup)
            print(
                f"{speedup}x {method:16s} KL {facts['before_gkd']['kl_nats']:.4f} -> "
                f"{facts['after_gkd']['kl_nats']:.4f}  perplexity {facts['after_gkd']['perplexity']:.2f}",
                flush=True,
            )


def gathered(place: Place) -> dict[float, dict[str, dict]]:
    """All facts so far, by speed-up and method."""
    result: dict[float, dict[str, dict]] = {}
    for speedup in sorted(SPEEDUPS):
        for path in sorted((place.folder / f"{speedup}x").glob("*/start.json")):
            facts = read_json(path)
            for name in ("result.json", "measured.json", "general.json"):
                if (path.parent / name).exists():
                    facts |= read_json(path.parent / name)
            facts["right"] = answered(path.parent)
            result.setdefault(speedup, {})[path.parent.name] = facts
    return result


def measure(place: Place) -> None:
    """Time every distilled child beside the parent, on the run's engine."""
    recipe = open_run(place.base)
    parent = load_parent(recipe, place.base)
    engine = ENGINES[recipe.engine]
    scenarios = ArchitectureSearch.load(recipe, place.base).costs.scenarios
    for speedup, children in gathered(place).items():
        for method, facts in children.items():
            path = place.folder / f"{speedup}x" / method / "measured.json"
            if "after_gkd" not in facts or path.exists():
                continue
            probe = probe_model(parent, Architecture.from_list(facts["architecture"]))
            with engine.loaded({"parent": parent, "child": probe}, place.folder / "scratch") as loaded:
                ratios = speedups(engine, loaded, scenarios, TIMING_REPEATS, recipe.costs.decode_steps_measured)
            write_json(path, {"speedup_measured": statistics.median(ratios), "speedup_by_repeat": sorted(ratios)})
            print(f"{speedup}x {method:16s} measured {statistics.median(ratios):.3f}x", flush=True)


def distilled_folders(place: Place) -> list[Path]:
    """Of all children that are finished."""
    return [path.parent for s in SPEEDUPS for path in sorted((place.folder / f"{s}x").glob("*/result.json"))]


def compare_generally(place: Place) -> None:
    """KL of every distilled child on books, mail, speeches and the like, of each kind as many tokens."""
    reference, machine = general_reference(place.base), machine_of(open_run(place.base))
    for folder in distilled_folders(place):
        if not (folder / "general.json").exists():
            child = load_model(folder / "child", machine)
            found = reference.compare(child)
            write_json(folder / "general.json", {"general": found.to_dict()})
            print(f"{folder} general KL {found.kl_nats:.4f} +- {found.kl_nats_standard_error:.4f}", flush=True)


def answer_tasks(place: Place) -> None:
    """Task accuracy of every distilled child and of the parent."""
    recipe = open_run(place.base)
    parent, machine = load_parent(recipe, place.base), machine_of(recipe)
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    tokenizer = load_tokenizer(parent_checkpoint(place.base))
    task = BUDGETS[place.name].task
    if items := items_of(task, USED["continuations"]):
        made_from = fingerprint([item.key.hex() for item in items])
        for folder in (place.folder, *distilled_folders(place)):
            path = folder / f"tasks/{task}.json"
            if path.exists() and read_json(path)["made_from"] == made_from:
                continue
            child = folder / "child"
            model = parent if folder == place.folder else load_model(child, machine)
            right = right_answers(model, tokenizer, items)
            write_json(path, {"made_from": made_from, "right": right})
            print(f"{path} {sum(right) / len(right):.3f}", flush=True)


def answered(folder: Path) -> dict[str, list[float]]:
    """By task, for each item whether it was answered right."""
    return {path.stem: read_json(path)["right"] for path in sorted((folder / "tasks").glob("*.json"))}


def report(place: Place) -> None:
    """Print the table of what is there, and keep it."""
    budget = BUDGETS[place.name]
    figures: dict[str, float | None] = {"gkd_tokens_of_library_methods": budget.own_tokens}
    rows = gathered(place)
    print(
        f"\n{'':6s}{'method':34s}{'pred.':>7s}{'meas.':>7s}{'KL before':>11s}{'KL':>8s}{'+-':>7s}{'ppl':>8s}"
        f"{'general KL':>12s}{'tokens':>8s}{'core s':>8s}  tasks"
    )
    for speedup, children in rows.items():
        done = {m: f for m, f in children.items() if "after_gkd" in f}
        labels = {m: m for m in FROM_LIBRARY if m in done}
        for label, ways in PAIRS.items():
            if any(way in done for way in ways):
                labels[label] = better(done, ways, "selection_kl_nats")
        labels |= {way: way for ways in PAIRS.values() for way in ways if way in done}
        for label, method in labels.items():
            facts, name = done[method], f"{label}_{speedup}x"
            figures[f"kl_{name}"] = facts["after_gkd"]["kl_nats"]
            figures[f"kl_standard_error_{name}"] = facts["after_gkd"]["kl_nats_standard_error"]
            figures[f"kl_{label}_before_gkd_{speedup}x"] = facts["before_gkd"]["kl_nats"]
            figures[f"perplexity_{name}"] = facts["after_gkd"]["perplexity"]
            figures[f"speedup_predicted_{name}"] = facts["speedup_predicted"]
            figures[f"gkd_tokens_{name}"] = facts["gkd_tokens"]
            figures[f"parameters_{name}"] = facts["parameters"]
            seconds = facts["core_seconds_to_start"] + (facts["core_seconds_of_gkd"] or float("nan"))
            if facts["core_seconds_of_gkd"]:
                figures[f"core_seconds_{name}"] = round(seconds, 1)
            if "speedup_measured" in facts:
                figures[f"speedup_measured_{name}"] = facts["speedup_measured"]
            if general := facts.get("general"):
                figures[f"kl_general_{name}"] = general["kl_nats"]
                figures[f"kl_general_standard_error_{name}"] = general["kl_nats_standard_error"]
            tasks = []
            for task, right in facts["right"].items():
                accuracy, ours = estimate(right), done["puzzle"]["right"].get(task)
                figures[f"accuracy_{task}_{name}"] = accuracy["mean"]
                tasks.append(f"{task} {accuracy['mean']:.3f}")
                if label != "puzzle" and ours is not None:
                    ahead = estimate(np.subtract(ours, right))
                    figures[f"accuracy_{task}_puzzle_less_{name}"] = ahead["mean"]
                    figures[f"accuracy_{task}_puzzle_less_{name}_standard_error"] = ahead["standard_error"]
                    tasks[-1] += f" (puzzle {ahead['mean']:+.3f} +- {ahead['standard_error']:.3f})"
            if label not in (way for ways in PAIRS.values() for way in ways):
                shown = label if label == method else f"{label} ({method})"
                print(
                    f"{speedup:.2f}x {shown:34s}{facts['speedup_predicted']:7.3f}"
                    f"{facts.get('speedup_measured', float('nan')):7.3f}{facts['before_gkd']['kl_nats']:11.4f}"
                    f"{facts['after_gkd']['kl_nats']:8.4f}{facts['after_gkd']['kl_nats_standard_error']:7.4f}"
                    f"{facts['after_gkd']['perplexity']:8.2f}{general['kl_nats'] if general else float('nan'):12.4f}"
                    f"{facts['gkd_tokens']:8d}{seconds:8.0f}  " + "  ".join(tasks)
                )
        for method, facts in children.items():
            figures.setdefault(f"kl_{method}_before_gkd_{speedup}x", facts["before_gkd"]["kl_nats"])
    for task, right in answered(place.folder).items():
        parent = estimate(right)
        print(f"parent: {task} {parent['mean']:.3f} +- {parent['standard_error']:.3f}, {len(right)} items")
        figures |= {f"accuracy_{task}_parent": parent["mean"], f"items_{task}": len(right)}
    library = place.base.seconds()
    figures["wall_seconds_of_library"] = round(
        sum(library[stage] for stage in ("build_library", "distill_blocks", "score_blocks")), 1
    )
    print("Written to", save(by_arithmetic(budget.results), figures))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=BUDGETS)
    parser.add_argument("speedups", nargs="*", type=float, default=SPEEDUPS)
    parser.add_argument("--both", action="store_true")
    parser.add_argument("--only", choices=(*FROM_LIBRARY, *PAIRS), metavar="METHOD")
    what = {"report": lambda _: None, "tasks": answer_tasks, "general": compare_generally, "measure": measure}
    for name in what:
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    place = Place(RunFolder(f"runs/{asked.run}"))
    chosen = [name for name in what if getattr(asked, name)]
    for name in chosen:
        what[name](place)
    if not chosen:
        make(place, tuple(asked.speedups), asked.both, asked.only)
    report(place)


if __name__ == "__main__":
    main()
