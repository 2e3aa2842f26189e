"""What summed scores cannot say about a child: measured by assembling it before it is chosen. Beyond the paper.

Replace-1-block scores are taken in the parent, where everything else is intact. In a child that has lost a good part
of its parent, another block may matter more or less; and what is left may learn to make up for the loss, of whole
neighbouring layers more readily than of many single blocks. So candidates of several kinds are assembled, refitted and
measured, and scores are taken again around the best of them: what it would gain or lose by each single change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from puzzle_nas.architecture import Architecture, Choice, choice_id, plain
from puzzle_nas.artifacts import RunFolder, fingerprint, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.effort import MIN_DIFFERENT, Effort
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.estimates import finite
from puzzle_nas.families import architecture_of
from puzzle_nas.library import assemble, block_subblocks, rounded_already, rounded_ends_of
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.scoring.replacement import ReplacementWalk, batch_tokens_of
from puzzle_nas.search import InfeasibleLimitsError, solve
from puzzle_nas.subblocks import windows_of
from puzzle_nas.training.refitting import RefitKL, refit_if_better, room_for_goals, rounded

REFIT_TOKENS = 8_192
"""Of calibration, to refit a candidate with: a third of the quickstart's, in a third of the time."""


class Trials:
    """Assembled children of one run, measured. What was measured is kept in files: no child is measured twice.

    Args:
        splits: tokens of `calibration`, `scoring` and `selection`, each [S, T].
        library: what the children are made of.
    """

    def __init__(
        self,
        run: RunFolder,
        parent: PreTrainedModel,
        recipe: Recipe,
        splits: Mapping[str, torch.Tensor],
        library: str = "main",
    ):
        self.run, self.parent, self.recipe, self.library = run, parent, recipe, library
        self._whole = architecture_of(parent.config)
        text = [hashlib.sha256(splits[name].numpy().tobytes()).hexdigest() for name in sorted(splits)]
        self._made_from = [library, recipe.refit, text]
        self._scoring = ParentReference(parent, splits["scoring"])
        calibration = splits["calibration"]
        self._calibration = calibration[: max(1, REFIT_TOKENS // calibration.shape[1])]
        self._selection = ParentReference(parent, splits["selection"])
        self._goals = room_for_goals(parent, self._calibration)

    def _kept(self, architecture: Architecture, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gives as JSON, or gave before for this child; `what` says of what it is a measure."""
        child = architecture.to_list()
        path = self.run.candidate(fingerprint([child, what, *self._made_from]))
        if not path.exists():
            write_json(path, {"measured": what, "library": self.library, "architecture": child, **measure()})
        return read_json(path)

    def kl_nats(self, architecture: Architecture) -> float:
        """KL(parent || child) on the selection split; refitted, where that is on and helps."""

        def measure() -> dict[str, Any]:
            child = assemble(self.run, self.parent, architecture, self.library)
            if not self.recipe.refit:
                if architecture.formats:
                    already = rounded_already(self.run, self.parent, architecture)
                    rounded(self.parent, child, self._calibration, already, self._goals)
                return {"selection_kl_nats": {"assembled": finite(self._selection.compare(child).kl_nats)}}
            ends = rounded_ends_of(self.run, self.parent, architecture)
            kl = refit_if_better(
                self.parent, child, self._selection, self._calibration, goals=self._goals, already=ends
            )[2]
            return {"selection_kl_nats": {"assembled": kl.before, "refitted": kl.after}}

        found = self._kept(architecture, "KL", measure)["selection_kl_nats"]
        return RefitKL(found["assembled"], found.get("refitted")).best

    def best_run(self, runs: list[range]) -> range:
        """The run of layers without which the parent's KL on the scoring split is lowest."""
        kl = []
        with progress(f"remove {len(runs[0])} layers, run", len(runs)) as ticker:
            for run in runs:
                without = self._whole.without(run)

                def measure(without: Architecture = without) -> dict[str, Any]:
                    child = assemble(self.run, self.parent, without, self.library)
                    return {"scoring_kl_nats": finite(self._scoring.compare(child).kl_nats)}

                found = self._kept(without, "KL on the scoring split", measure)["scoring_kl_nats"]
                kl.append(math.nan if found is None else found)
                ticker.advance()
        return min(zip(kl, runs, strict=True), key=lambda result: (math.isnan(result[0]), result[0]))[1]

    def scores_around(
        self, architecture: Architecture, choices: Iterable[Choice], on_layer: Callable[[], None] = lambda: None
    ) -> dict[Choice, float]:
        """By how many nats the child's KL on the scoring split changes with each single choice; negative is better.

        Child and choices are taken in the model's precision. A change after which KL is not finite has no score.
        """
        choices = [choice for choice in choices if choice == plain(choice) and choice[0] < len(architecture.layers)]
        architecture = architecture.plain

        def measure() -> dict[str, Any]:
            changes = self._changes_around(architecture, choices, on_layer)
            rows = [[layer, choice_id(specs), finite(change)] for (layer, specs), change in changes.items()]
            return {"changes_of_scoring_kl_nats": rows}

        rows = self._kept(architecture, "KL after each single change", measure)["changes_of_scoring_kl_nats"]
        found = {(layer, name): change for layer, name, change in rows}
        scores = {choice: found[choice[0], choice_id(choice[1])] for choice in choices}
        return {choice: change for choice, change in scores.items() if change is not None}

    def _changes_around(
        self, architecture: Architecture, choices: Sequence[Choice], on_layer: Callable[[], None]
    ) -> dict[Choice, float]:
        child = assemble(self.run, self.parent, architecture, self.library)
        windows = windows_of(spec for _, specs in choices for spec in specs)
        tokens, batch_tokens = self._scoring.tokens_ST, batch_tokens_of(self.parent)
        walk = ReplacementWalk(self.parent, tokens, batch_tokens, child, windows=windows)
        present = float(walk.model_itself().kl_nats.double().mean())
        scores: dict[Choice, float] = {}
        for layer, block in enumerate(architecture.layers):
            here = [choice for choice in choices if choice[0] == layer]
            changes = [c for c in here if any(block[spec.slot] != spec for spec in c[1])]
            blocks = block_subblocks(self.run, self.parent, layer, [specs for _, specs in changes], self.library)
            results = walk.try_variants(blocks)
            scores |= dict.fromkeys(here, 0.0)
            for choice, result in zip(changes, results, strict=True):
                scores[choice] = float(result.kl_nats.double().mean()) - present
            on_layer()
            if layer + 1 < len(architecture.layers):
                walk.advance()
        return scores


MAX_CHANGES = (2, 4, 8, 16)
"""How far from the best child so far the search may go: scores around it hold near it. Each is tried and measured."""


class Refinement:
    """From the search's best choices to the child whose measured KL is lowest.

    Args:
        searches: of the same space and costs, by different scores; candidates come from each in turn.
    """

    def __init__(self, searches: Sequence[ArchitectureSearch], effort: Effort, trials: Trials):
        self.searches, self.effort, self.trials = searches, effort, trials
        self.tried: list[dict[str, Any]] = []
        """What was measured, in order: how it was found, its summed score, its predicted speed-up, its KL."""
        self._near: tuple[ArchitectureSearch, Architecture] | None = None

    def best(self, limits: dict[str, float]) -> Architecture:
        """The best child within the limits. Asked again, for tighter ones, it takes no new scores.

        Raises:
            InfeasibleError: nothing meets the limits.
        """
        if self._near is not None:
            return self._best_near(*self._near, limits)[1]
        found = self.searches[0]
        kinds = [self._by_sums(limits), *([child] for child in self._by_runs(limits))]
        labels = ["search", *["removed run"] * (len(kinds) - 1)]
        if quantised := [
            a for a in found.space.quantised_parents.values() if found.meets(limits, a) and a not in kinds[0]
        ]:
            kinds.append(quantised)
            labels.append("quantised parent")
        measured = self._measured(found, labels, kinds)
        leaders = sorted((min(kind, key=_kl) for kind in measured if kind), key=_kl)
        best, rounds = leaders[0], min(self.effort.refine_rounds, len(leaders))
        for number, (_, around) in enumerate(leaders[:rounds], start=1):
            with progress(f"score around a child, round {number}/{rounds}, layer", len(around.layers)) as ticker:
                changes = self.trials.scores_around(around, found.scores, ticker.advance)
            heads = {choice: 0.0 for choice in found.scores if choice[0] == len(around.layers)}
            scores = {
                choice: (changes | heads)[plain(choice)] + score - found.scores[plain(choice)]
                for choice, score in found.scores.items()
                if plain(choice) in changes | heads
            }
            near = replace(found, scores=scores), around
            refined = self._best_near(*near, limits)
            if self._near is None or refined[0] < best[0]:
                self._near = near
            best = min(best, refined, key=_kl)
        return best[1]

    def _by_sums(self, limits: dict[str, float]) -> list[Architecture]:
        candidates: list[Architecture] = []
        for number, search in enumerate(self.searches[: self.effort.by_sums]):
            count = len(range(number, self.effort.by_sums, len(self.searches)))
            solutions = search.solve(limits, num_solutions=count, min_different=MIN_DIFFERENT)
            candidates += [a for a in map(search.architecture, solutions) if a not in candidates]
        return candidates

    def _by_runs(self, limits: dict[str, float]) -> list[Architecture]:
        """Without as many neighbouring layers as would be enough alone, in whichever format that is fewest; without
        half as many of these; and so on."""
        found, candidates = self.searches[0], []
        layers, removable = range(len(found.parent.layers)), found.removable_layers
        starts = (found.parent, *found.space.quantised_parents.values())
        enough = (n for n in layers if any(found.meets(limits, start.without(range(n))) for start in starts))
        length = next(enough, 0)
        if length and not removable and self.effort.removed_runs:
            console.print("  The search space lets no whole layer go, often the better way: see search_space.no_op.")
        while length and len(candidates) < self.effort.removed_runs:
            runs = [range(first, first + length) for first in layers[: len(layers) - length + 1]]
            if runs := [run for run in runs if removable.issuperset(run)]:
                layers = self.trials.best_run(runs)
                solutions = found.without(layers).solve(limits)
                candidates += map(found.architecture, solutions)
            length //= 2
        return candidates

    def _best_near(
        self, near: ArchitectureSearch, around: Architecture, limits: dict[str, float]
    ) -> tuple[float, Architecture]:
        proposals = []
        for max_changes in (*MAX_CHANGES, len(near.scores)):
            if proposals and max_changes > MAX_CHANGES[-1]:
                break
            problem = near.problem(limits, around, max_changes)
            try:
                (solution,) = solve(problem)
            except InfeasibleLimitsError:
                # Tighter limits may be out of reach within few changes, never within any number.
                continue
            if (proposal := near.architecture(solution)) not in proposals:
                proposals.append(proposal)
        (measured,) = self._measured(near, ["refinement"], [proposals])
        return min(measured, key=_kl)

    def _measured(
        self, found: ArchitectureSearch, found_by: Sequence[str], kinds: Sequence[Sequence[Architecture]]
    ) -> list[list[Measured]]:
        """KL of all children of each kind, those left out for which it is not finite."""
        results: list[list[Measured]] = []
        with progress("assemble, refit and measure, child", sum(map(len, kinds))) as ticker:
            for how, architectures in zip(found_by, kinds, strict=True):
                results.append([])
                for architecture in architectures:
                    if math.isfinite(kl := self.trials.kl_nats(architecture)):
                        results[-1].append((kl, architecture))
                        speedup = found.costs.mix_ms(found.parent) / found.costs.mix_ms(architecture)
                        self.tried.append(
                            {
                                "found_by": how,
                                "score_sum": found.score_of(architecture),
                                "speedup_predicted": speedup,
                                "selection_kl_nats": kl,
                            }
                        )
                    ticker.advance()
        if left_out := sum(map(len, kinds)) - sum(map(len, results)):
            console.print(f"  {left_out} assembled children left out: KL not finite.")
        if not any(results):
            raise InfeasibleError("Every child that meets the limits has a KL that is not finite; loosen a limit.")
        return results


Measured: TypeAlias = tuple[float, Architecture]
"""KL in nats on the selection split, and whose."""


def _kl(measured: Measured) -> float:
    return measured[0]
