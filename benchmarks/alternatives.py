"""Puzzle against what people would do instead, on the same parent at the same predicted speed, with the same text.

    puzzle          our search (measured candidates, one round of refinement), refit, GKD
    greedy          the library's variants, chosen layer by layer (Puzzle, table 11)
    random          the library's variants, drawn at random: the median of five draws
    block_influence whole layers removed, those that turn their input least first (ShortGPT)
    contiguous      whole layers removed, the run of them that harms KL least (Minitron, depth)
    width           every FFN as narrow as the next, by Channel Contribution (Minitron, width)
    width_refitted  the same with our choice of channels and least squares

Whole layers reach only some speeds; the one nearest to 1.25x, 1.5x and 2x is the limit of every method. FFN widths
are costed on straight lines between those of the cost table and a timed width of 32. Where no FFN width is fast enough,
the fewest whole layers that leave a quarter of the width go as well, by block influence.

Text: `puzzle`, `greedy` and `random` get OWN_TOKENS of GKD beside the library's calibration and BLD text; the others,
which need no library, get all three together as GKD. Chosen on selection, reported on validation. `depth_pruned` and
`width_pruned` are the better of their two ways on selection before GKD; with --both, each is distilled and the better
one afterwards counts.
Reads runs/quickstart; children are kept in runs/benchmark-alternatives, so a second call goes on where one stopped.

python benchmarks/alternatives.py [--both] [SPEEDUP ...]   make and evaluate children
python benchmarks/alternatives.py --tasks   multiple-choice accuracy of the children, where the files are
python benchmarks/alternatives.py --measure   time them beside the parent: wants a quiet machine
"""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from results import save
from task_accuracy import accuracies

from puzzle_nas.architecture import Architecture, GatedFFN, GroupedAttention, NoOpAttention, NoOpFFN, Spec
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_bytes, write_json
from puzzle_nas.costs import CostTable
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.engines import ENGINES, speedups
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.families import load_parent, load_tokenizer, save_model
from puzzle_nas.families.loading import parent_checkpoint, probe_model, shape_of
from puzzle_nas.library import assemble
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import Recipe
from puzzle_nas.search import Limit
from puzzle_nas.search.baselines import random_architecture
from puzzle_nas.stages import build_library
from puzzle_nas.stages.distill_child import Training
from puzzle_nas.stages.refit_child import refit
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.refinement import Refinement, Trials

BASE = RunFolder("runs/quickstart")
FOLDER = Path("runs/benchmark-alternatives")
SPEEDUPS = (1.5, 1.25, 2.0)
OWN_TOKENS = 16_384
EVALUATIONS = 4
"""Points of GKD's curve, the best of which counts."""
RANDOM_DRAWS = 5
INFLUENCE_TOKENS = 8_192
CONTIGUOUS_TOKENS = 2_048
FROM_LIBRARY = ("puzzle", "greedy", "random")
PAIRS = {"depth_pruned": ("block_influence", "contiguous"), "width_pruned": ("width_refitted", "width")}
WIDTH_MULTIPLE = 16
NARROWEST = 32
"""FFN width timed to cost those that the table lacks."""
NARROW_REPEATS = 7
TIMING_REPEATS = 15


def linked(path: Path) -> RunFolder:
    """A run folder that shares the base run's parent and text."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("data", "parent", "parent.json"):
        if not (path / name).exists():
            (path / name).symlink_to((BASE / name).resolve())
    return RunFolder(path)


def narrow_shares(parent: PuzzleForCausalLM, recipe: Recipe) -> dict[int, float]:
    """Runtime of FFNs narrower than the cost table's, as a share of its narrowest one's; timed once, in stacks."""
    path = FOLDER / "narrow.json"
    if not path.exists():
        shape = shape_of(parent.config)
        costs = CostTable.load(BASE, recipe)
        narrowest = min(spec_width(name) for name in costs.data["bytes"]["variants"] if name.startswith("ffn.w"))
        stacks: dict[int, Spec] = {w: GatedFFN(w) for w in (narrowest, NARROWEST)}
        own = Architecture.of_parent(shape).layers[0]
        models = {
            str(width): probe_model(parent, Architecture(({**own, "ffn": spec},) * shape.num_hidden_layers))
            for width, spec in {**stacks, 0: NoOpFFN()}.items()
        }
        engine, steps = ENGINES[recipe.engine], recipe.costs.decode_steps_measured
        times: dict[str, list[float]] = {name: [] for name in models}
        with engine.loaded(models, FOLDER / "scratch") as loaded:
            for _ in range(NARROW_REPEATS):
                for name, seen in times.items():
                    parts = [s.weight * engine.time_parts(loaded[name], s, steps).total_ms(s) for s in costs.scenarios]
                    seen.append(sum(parts))
        median = {int(name): statistics.median(seen) for name, seen in times.items()}
        write_json(path, {w: (median[w] - median[0]) / (median[narrowest] - median[0]) for w in stacks})
    return {int(width): share for width, share in read_json(path).items()}


def spec_width(name: str) -> int:
    """Of a variant id of the cost table."""
    return int(name.removeprefix("ffn.w"))


def with_widths(costs: CostTable, widths: list[int], narrow: dict[int, float]) -> CostTable:
    """The table with more FFN widths: times between its own, and below them by `narrow`; bytes on their line."""

    def own(entries: dict[str, dict[str, float]]) -> dict[int, dict[str, float]]:
        return {spec_width(name): e for name, e in sorted(entries.items()) if name.startswith("ffn.w")}

    data = copy.deepcopy(dict(costs.data))
    sizes, known = data["bytes"]["variants"], own(data["bytes"]["variants"])
    for width in widths:
        fits = {f: np.polyfit(list(known), [e[f] for e in known.values()], 1) for f in next(iter(known.values()))}
        sizes.setdefault(f"ffn.w{width}", {f: round(float(np.polyval(fit, width))) for f, fit in fits.items()})
    for scenario in data["scenarios"].values():
        points = own(scenario["variants"])
        narrowest = points[min(points)]
        points |= {w: {f: share * v for f, v in narrowest.items()} for w, share in narrow.items() if w < min(points)}
        at = sorted(points)
        for width in widths:
            times = {f: float(np.interp(width, at, [points[w][f] for w in at])) for f in narrowest}
            scenario["variants"].setdefault(f"ffn.w{width}", times)
    return replace(costs, data=data)


@dataclass
class Start:
    """A child before GKD."""

    model: PuzzleForCausalLM
    architecture: Architecture
    facts: dict


class Benchmark:
    """One parent, its library, and every method."""

    def __init__(self) -> None:
        self.recipe = open_run(BASE)
        self.parent, self.shape = load_parent(BASE)
        self.threads = self.recipe.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        self.found = ArchitectureSearch.load(self.recipe, BASE)
        widths = list(range(NARROWEST, self.shape.intermediate_size, WIDTH_MULTIPLE))
        self.costs = with_widths(self.found.costs, widths, narrow_shares(self.parent, self.recipe))
        self.tokenizer = load_tokenizer(parent_checkpoint(BASE))
        self.calibration = load_tokens(BASE, "calibration")
        self.total_tokens = OWN_TOKENS + self.recipe.bld.tokens + self.calibration.numel()

    @cached_property
    def trials(self) -> Trials:
        splits = (load_tokens(BASE, split) for split in ("scoring", "selection"))
        return Trials(BASE, self.parent, *splits, self.recipe.scoring.batch_tokens)

    @cached_property
    def selection(self) -> ParentReference:
        return ParentReference(self.parent, load_tokens(BASE, "selection"))

    @cached_property
    def validation(self) -> ParentReference:
        return ParentReference(self.parent, load_tokens(BASE, "validation"))

    # speeds
    def speedup(self, architecture: Architecture) -> float:
        """Predicted."""
        return self.costs.mix_ms(self.found.parent) / self.costs.mix_ms(architecture)

    def without(self, layers: list[int], width: int | None = None) -> Architecture:
        """The parent without some layers, every remaining FFN `width` wide."""
        gone = {"attention": NoOpAttention(), "ffn": NoOpFFN()}
        kept = {
            "attention": GroupedAttention(self.shape.num_key_value_heads),
            "ffn": GatedFFN(width or self.shape.intermediate_size),
        }
        return Architecture(tuple(gone if i in layers else kept for i in range(self.shape.num_hidden_layers)))

    def speedup_of(self, removed: int, width: int) -> float:
        """Predicted, of the parent with so many layers fewer and FFNs so wide."""
        block = [GroupedAttention(self.shape.num_key_value_heads), GatedFFN(width)]
        own = sum(self.costs.columns_of(spec)["runtime_ms"] for spec in block)
        left = self.shape.num_hidden_layers - removed
        return self.costs.mix_ms(self.found.parent) / (self.costs.fixed["runtime_ms"] + left * own)

    def removed_layers(self, speedup: float) -> int:
        """How many layers to remove to come nearest to a speed-up."""
        counts, width = range(1, self.shape.num_hidden_layers), self.shape.intermediate_size
        return min(counts, key=lambda n: abs(self.speedup_of(n, width) - speedup))

    def target(self, speedup: float) -> float:
        """The speed-up, nearest to `speedup`, that removing whole layers reaches."""
        return self.speedup_of(self.removed_layers(speedup), self.shape.intermediate_size)

    def width_of(self, speedup: float) -> tuple[int, int]:
        """Layers to remove, the fewest, and the largest FFN width that meet the target."""
        quarter, target = self.shape.intermediate_size // 4, self.target(speedup)
        for removed in range(self.shape.num_hidden_layers):
            for width in range(self.shape.intermediate_size, (quarter if removed else NARROWEST) - 1, -WIDTH_MULTIPLE):
                if self.speedup_of(removed, width) >= target:
                    return removed, width
        raise AssertionError("a parent of one layer")

    # methods
    @cached_property
    def influence(self) -> list[float]:
        """1 - cosine of each layer's input and output, mean over calibration tokens (ShortGPT)."""
        tokens = self.calibration[: INFLUENCE_TOKENS // self.calibration.shape[1]]
        sums, count = torch.zeros(self.shape.num_hidden_layers), 0
        with torch.inference_mode():
            for batch in tokens.split(8):
                states = self.parent.model(batch, use_cache=False, output_hidden_states=True).hidden_states
                for i in range(len(sums)):
                    cosine = torch.nn.functional.cosine_similarity(states[i].float(), states[i + 1].float(), dim=-1)
                    sums[i] += (1 - cosine).sum()
                count += batch.numel()
        return (sums / count).tolist()

    def least_influential(self, count: int) -> list[int]:
        return sorted(sorted(range(len(self.influence)), key=self.influence.__getitem__)[:count])

    def puzzle(self, speedup: float) -> Start:
        refinement = Refinement(self.found, self.recipe.search, self.trials)
        architecture = refinement.best({"speedup": self.target(speedup)})
        child = assemble(BASE, self.parent, architecture)
        refitted = copy.deepcopy(child)
        refit(self.parent, refitted, self.calibration, self.recipe.refit.ridge, lambda: None)
        kept = self.selection.compare(refitted).kl_nats < self.selection.compare(child).kl_nats
        facts = {"assembled_kl_nats": self.validation.compare(child).kl_nats, "refit_kept": kept}
        return Start(refitted if kept else child, architecture, facts)

    def greedy(self, speedup: float) -> Start:
        limits, gap, seconds = {"speedup": self.target(speedup)}, self.recipe.search.gap, 60.0
        (best,) = self.found.solve(limits, gap, seconds)
        solution = self.found.baselines(self.found.problem(limits), best, gap, seconds)["greedy"]()
        return self._assembled(self.found.architecture(solution))

    def random(self, speedup: float) -> Start:
        problem = self.found.problem({"speedup": self.target(speedup)})
        (limit,) = problem.limits
        assert limit.maximum is not None
        # As slow as allowed, not merely fast enough.
        problem = replace(problem, limits=(Limit(limit.column, minimum=0.99 * limit.maximum, maximum=limit.maximum),))
        rng = np.random.default_rng(self.recipe.seed)
        drawn = [self.found.architecture(random_architecture(problem, rng)) for _ in range(RANDOM_DRAWS)]
        kl = [self.trials.kl_nats(architecture) for architecture in drawn]
        median = drawn[kl.index(statistics.median(kl))]
        return self._assembled(median, {"selection_kl_nats_of_draws": kl})

    def block_influence(self, speedup: float) -> Start:
        layers = self.least_influential(self.removed_layers(speedup))
        return self._assembled(self.without(layers), {"removed_layers": layers})

    def contiguous(self, speedup: float) -> Start:
        count = self.removed_layers(speedup)
        tokens = load_tokens(BASE, "selection")
        reference = ParentReference(self.parent, tokens[: CONTIGUOUS_TOKENS // tokens.shape[1]])
        runs = [list(range(i, i + count)) for i in range(self.shape.num_hidden_layers - count + 1)]
        children = (assemble(BASE, self.parent, self.without(layers)) for layers in runs)
        kl = [reference.compare(child).kl_nats for child in children]
        layers = runs[kl.index(min(kl))]
        return self._assembled(self.without(layers), {"removed_layers": layers, "selection_kl_nats_of_runs": kl})

    def width(self, speedup: float) -> Start:
        return self._narrowed("paper", speedup)

    def width_refitted(self, speedup: float) -> Start:
        return self._narrowed("least_squares", speedup)

    def _narrowed(self, initialisation: str, speedup: float) -> Start:
        widths = sorted({self.width_of(s)[1] for s in SPEEDUPS})
        run = linked(FOLDER / f"library-{initialisation}")
        settings = self.recipe.model_dump(mode="json")
        settings["threads"] = self.threads
        settings["library"]["initialisation"] = initialisation
        settings["search_space"] |= {
            "width_fractions": [w / self.shape.intermediate_size for w in widths],
            "multiple_of": WIDTH_MULTIPLE,
            "attention_linear": False,
            "ffn_linear": False,
        }
        recipe = Recipe.model_validate(settings)
        write_bytes(run.recipe, recipe.to_yaml().encode())
        build_library.run(recipe, run)
        if not (run / "library/main").exists():
            (run / "library/main").symlink_to("initial")
        removed, width = self.width_of(speedup)
        layers = self.least_influential(removed)
        architecture = self.without(layers, width)
        facts = {"intermediate_size": width, "removed_layers": layers}
        return Start(assemble(run, self.parent, architecture), architecture, facts)

    def _assembled(self, architecture: Architecture, facts: dict | None = None) -> Start:
        return Start(assemble(BASE, self.parent, architecture), architecture, facts or {})

    # stages of one child, each kept
    def started(self, method: str, speedup: float) -> dict:
        """Make a child and evaluate it before GKD; the facts."""
        run = linked(FOLDER / f"{speedup}x" / method)
        if not (run / "start.json").exists():
            begin = time.process_time()
            start = getattr(self, method)(speedup)
            seconds = time.process_time() - begin
            with complete_folder(run / "start") as partial:
                save_model(start.model, None, partial)
            facts = {
                "architecture": start.architecture.to_list(),
                "speedup_predicted": self.speedup(start.architecture),
                "parameters": sum(p.numel() for p in start.model.parameters()),
                "core_seconds_to_start": seconds,
                "selection_kl_nats_before_gkd": self.selection.compare(start.model).kl_nats,
                "before_gkd": self.validation.compare(start.model).to_dict(),
                **start.facts,
            }
            write_json(run / "start.json", facts)
        return read_json(run / "start.json")

    def distilled(self, method: str, speedup: float) -> dict:
        """Distil a child that has been started; all its facts."""
        facts, run = self.started(method, speedup), RunFolder(FOLDER / f"{speedup}x" / method)
        if not (run / "result.json").exists():
            tokens = OWN_TOKENS if method in FROM_LIBRARY else self.total_tokens
            batches = -(-tokens // self.recipe.gkd.batch_tokens)
            gkd = self.recipe.gkd.model_copy(
                update={"tokens": tokens, "evaluate_every_steps": -(-batches // EVALUATIONS)}
            )
            start = PuzzleForCausalLM.from_pretrained(run / "start", dtype=self.parent.dtype).eval()
            begin = time.process_time()
            training = Training(self.recipe.model_copy(update={"gkd": gkd}), run, self.parent, start)
            resumed = training.state_path.exists()
            training.train()
            seconds = None if resumed else time.process_time() - begin
            if training.best["step"]:
                training.finish()
            child = (training.child if training.best["step"] else start).to(self.parent.dtype).eval()
            with complete_folder(run / "child") as partial:
                save_model(child, self.tokenizer, partial)
            after = {
                "gkd_tokens": tokens,
                "core_seconds_of_gkd": seconds,
                "selection_kl_nats": training.best["selection_kl_nats"],
                "curve": training.curve,
                "after_gkd": self.validation.compare(child).to_dict(),
            }
            write_json(run / "result.json", after)
            shutil.rmtree(run / "scratch")
        return facts | read_json(run / "result.json")


def better(facts: dict[str, dict], ways: tuple[str, str], field: str) -> str:
    """The way with the lower KL on selection."""
    return min((way for way in ways if way in facts), key=lambda way: facts[way][field])


def make(speedup_list: tuple[float, ...], both: bool) -> None:
    """Make, distil and evaluate; print a line for each child."""
    bench = Benchmark()
    for speedup in speedup_list:
        started: dict[str, dict] = {}

        def attempt(action: Callable[[str, float], dict], method: str, speedup: float = speedup) -> dict | None:
            try:
                return action(method, speedup)
            except InfeasibleError as error:
                print(f"{speedup}x {method}: {error}", flush=True)
                return None

        for method in (*FROM_LIBRARY, *PAIRS["depth_pruned"], *PAIRS["width_pruned"]):
            if facts := attempt(bench.started, method):
                started[method] = facts
                print(
                    f"{speedup}x {method:16s} predicted {facts['speedup_predicted']:.3f}x  "
                    f"KL before GKD {facts['before_gkd']['kl_nats']:.4f}",
                    flush=True,
                )
        chosen = [m for m in FROM_LIBRARY if m in started]
        for ways in PAIRS.values():
            first = better(started, ways, "selection_kl_nats_before_gkd")
            chosen += ways if both else (first,)
        for method in chosen:
            facts = bench.distilled(method, speedup)
            print(
                f"{speedup}x {method:16s} KL {facts['before_gkd']['kl_nats']:.4f} -> "
                f"{facts['after_gkd']['kl_nats']:.4f}  perplexity {facts['after_gkd']['perplexity']:.2f}",
                flush=True,
            )


def gathered() -> dict[float, dict[str, dict]]:
    """All facts so far, by speed-up and method."""
    result: dict[float, dict[str, dict]] = {}
    for speedup in sorted(SPEEDUPS):
        for path in sorted((FOLDER / f"{speedup}x").glob("*/start.json")):
            facts = read_json(path)
            for name in ("result.json", "measured.json", "tasks.json"):
                if (path.parent / name).exists():
                    facts |= read_json(path.parent / name)
            result.setdefault(speedup, {})[path.parent.name] = facts
    return result


def measure() -> None:
    """Time every distilled child beside the parent, on the run's engine."""
    recipe = open_run(BASE)
    parent, _ = load_parent(BASE)
    engine = ENGINES[recipe.engine]
    scenarios = ArchitectureSearch.load(recipe, BASE).costs.scenarios
    for speedup, children in gathered().items():
        for method, facts in children.items():
            path = FOLDER / f"{speedup}x" / method / "measured.json"
            if "after_gkd" not in facts or path.exists():
                continue
            probe = probe_model(parent, Architecture.from_list(facts["architecture"]))
            with engine.loaded({"parent": parent, "child": probe}, FOLDER / "scratch") as loaded:
                ratios = speedups(engine, loaded, scenarios, TIMING_REPEATS, recipe.costs.decode_steps_measured)
            write_json(path, {"speedup_measured": statistics.median(ratios), "speedup_by_repeat": sorted(ratios)})
            print(f"{speedup}x {method:16s} measured {statistics.median(ratios):.3f}x", flush=True)


def answer_tasks() -> None:
    """Task accuracy of every distilled child and of the parent."""
    parent, _ = load_parent(BASE)
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    tokenizer = load_tokenizer(parent_checkpoint(BASE))
    done = [p.parent for s in SPEEDUPS for p in sorted((FOLDER / f"{s}x").glob("*/result.json"))]
    for folder in (FOLDER, *done):
        if not (folder / "tasks.json").exists():
            model = (
                parent if folder == FOLDER else PuzzleForCausalLM.from_pretrained(folder / "child", dtype=parent.dtype)
            )
            found = accuracies(model.eval(), tokenizer)
            write_json(folder / "tasks.json", {"accuracy": found})
            print(folder, found, flush=True)


def report() -> None:
    """Print the table of what is there, and keep it."""
    figures: dict[str, float] = {"gkd_tokens_of_library_methods": OWN_TOKENS}
    rows = gathered()
    print(
        f"\n{'':6s}{'method':34s}{'pred.':>7s}{'meas.':>7s}{'KL before':>11s}{'KL':>8s}{'+-':>7s}{'ppl':>8s}"
        f"{'tokens':>8s}{'core s':>8s}  tasks"
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
            seconds = facts["core_seconds_to_start"] + (facts["core_seconds_of_gkd"] or 0.0)
            if facts["core_seconds_of_gkd"]:
                figures[f"core_seconds_{name}"] = round(seconds, 1)
            if "speedup_measured" in facts:
                figures[f"speedup_measured_{name}"] = facts["speedup_measured"]
            tasks = facts.get("accuracy", {})
            figures |= {f"accuracy_{task}_{name}": value for task, value in tasks.items()}
            if label in PAIRS or method in FROM_LIBRARY:
                shown = label if label == method else f"{label} ({method})"
                print(
                    f"{speedup:.2f}x {shown:34s}{facts['speedup_predicted']:7.3f}"
                    f"{facts.get('speedup_measured', float('nan')):7.3f}{facts['before_gkd']['kl_nats']:11.4f}"
                    f"{facts['after_gkd']['kl_nats']:8.4f}{facts['after_gkd']['kl_nats_standard_error']:7.4f}"
                    f"{facts['after_gkd']['perplexity']:8.2f}{facts['gkd_tokens']:8d}{seconds:8.0f}  "
                    + " ".join(f"{task} {value:.3f}" for task, value in tasks.items())
                )
        for method, facts in children.items():
            figures.setdefault(f"kl_{method}_before_gkd_{speedup}x", facts["before_gkd"]["kl_nats"])
    if (FOLDER / "tasks.json").exists():
        figures |= {f"accuracy_{t}_parent": v for t, v in read_json(FOLDER / "tasks.json")["accuracy"].items()}
    library = BASE.seconds()
    figures["wall_seconds_of_library"] = round(
        sum(library[stage] for stage in ("build_library", "distill_blocks", "score_blocks")), 1
    )
    print("Written to", save("alternatives", figures))


def main() -> None:
    """See above."""
    arguments = sys.argv[1:]
    if "--measure" in arguments:
        measure()
    elif "--tasks" in arguments:
        answer_tasks()
    else:
        make(tuple(float(a) for a in arguments if a != "--both") or SPEEDUPS, "--both" in arguments)
    report()


if __name__ == "__main__":
    main()
