"""What summed scores cannot say about a child: measured by assembling it before it is chosen. Beyond the paper.

Replace-1-block scores are taken in the parent, where everything else is intact. In a child that has lost a good part
of its parent, another block may matter more or less. So candidates are assembled and measured, and scores are taken
anew around the best of them: what it would gain or lose by each single change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from puzzle_nas.architecture import Architecture, Choice
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.library import assemble, block_layers
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.progress import console, progress
from puzzle_nas.recipe import SearchSettings
from puzzle_nas.search import InfeasibleLimitsError, solve
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.replacement import ReplacementWalk


class Trials:
    """Assembled children of one run, measured. Nothing is written.

    Args:
        scoring_tokens, selection_tokens: those splits, [S, T].
        batch_tokens: tokens whose activations are in memory together.
        library: what the children are made of.
    """

    def __init__(
        self,
        run: RunFolder,
        parent: PuzzleForCausalLM,
        scoring_tokens: torch.Tensor,
        selection_tokens: torch.Tensor,
        batch_tokens: int,
        library: str = "main",
    ):
        self.run, self.parent, self.batch_tokens, self.library = run, parent, batch_tokens, library
        self.scoring_tokens = scoring_tokens
        self._reference = ParentReference(parent, selection_tokens)

    def kl_nats(self, architecture: Architecture) -> float:
        """KL(parent || child) on the selection split."""
        return self._reference.compare(assemble(self.run, self.parent, architecture, self.library)).kl_nats

    def scores_around(
        self, architecture: Architecture, choices: Iterable[Choice], on_layer: Callable[[], None] = lambda: None
    ) -> dict[Choice, float]:
        """By how many nats the child's KL on the scoring split changes with each single choice; negative is better.

        A change after which it is not finite has no score.
        """
        choices = list(choices)
        child = assemble(self.run, self.parent, architecture, self.library)
        walk = ReplacementWalk(self.parent, self.scoring_tokens, self.batch_tokens, child)
        present = float(walk.model_itself().kl_nats.double().mean())
        scores: dict[Choice, float] = {}
        for layer, block in enumerate(architecture.layers):
            here = [choice for choice in choices if choice[0] == layer]
            changes = [c for c in here if any(block[spec.slot] != spec for spec in c[1])]
            blocks = block_layers(self.run, self.parent, layer, [specs for _, specs in changes], self.library)
            results = walk.try_variants(blocks)
            scores |= dict.fromkeys(here, 0.0)
            for choice, result in zip(changes, results, strict=True):
                change = float(result.kl_nats.double().mean()) - present
                if math.isfinite(change):
                    scores[choice] = change
                else:
                    del scores[choice]
            on_layer()
            if layer + 1 < len(architecture.layers):
                walk.advance()
        return scores


MAX_CHANGES = (4, 8, 16, 32)
"""How far from the best child so far the search may go: scores around it hold near it. Each is tried and measured."""


class Refinement:
    """From the search's best choices to the child whose measured KL is lowest.

    Args:
        searches: of the same space and costs, by different scores; candidates come from each in turn.
    """

    def __init__(self, searches: Sequence[ArchitectureSearch], settings: SearchSettings, trials: Trials):
        self.searches, self.settings, self.trials = searches, settings, trials
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
        settings, found = self.settings, self.searches[0]
        candidates: list[Architecture] = []
        for number, search in enumerate(self.searches[: settings.verify]):
            count = len(range(number, settings.verify, len(self.searches)))
            solutions = search.solve(limits, settings.gap, settings.time_limit_seconds, count, settings.min_different)
            candidates += [a for a in map(search.architecture, solutions) if a not in candidates]
        kl, best = self._measured("search", found, candidates)
        for number in range(1, settings.refine_rounds + 1):
            layers = len(best.layers)
            with progress(f"score around the child, round {number}/{settings.refine_rounds}, layer", layers) as ticker:
                scores = self.trials.scores_around(best, found.scores, ticker.advance)
            self._near = replace(found, scores=scores), best
            refined_kl, refined = self._best_near(*self._near, limits)
            if refined_kl >= kl:
                break
            kl, best = refined_kl, refined
        return best

    def _best_near(
        self, near: ArchitectureSearch, around: Architecture, limits: dict[str, float]
    ) -> tuple[float, Architecture]:
        proposals = []
        for max_changes in (*MAX_CHANGES, len(near.scores)):
            problem = near.problem(limits, around, max_changes)
            try:
                (solution,) = solve(problem, self.settings.gap, self.settings.time_limit_seconds)
            except InfeasibleLimitsError:
                # Tighter limits may be out of reach within few changes, never within any number.
                continue
            if (proposal := near.architecture(solution)) not in proposals:
                proposals.append(proposal)
        return self._measured("refinement", near, proposals)

    def _measured(
        self, how: str, found: ArchitectureSearch, proposals: list[Architecture]
    ) -> tuple[float, Architecture]:
        measured = [(self.trials.kl_nats(architecture), architecture) for architecture in proposals]
        results = [result for result in measured if math.isfinite(result[0])]
        if len(results) < len(measured):
            console.print(f"  {len(measured) - len(results)} assembled children left out: KL not finite.")
        if not results:
            raise InfeasibleError("Every child that meets the limits has a KL that is not finite; loosen a limit.")
        self.tried += [
            {
                "found_by": how,
                "score_sum": found.score_of(architecture),
                "speedup_predicted": found.costs.mix_ms(found.parent) / found.costs.mix_ms(architecture),
                "selection_kl_nats": kl,
            }
            for kl, architecture in results
        ]
        return min(results, key=lambda result: result[0])
