"""What summed scores cannot say about a child: measured by assembling it before it is chosen. Beyond the paper.

Replace-1-block scores are taken in the parent, where everything else is intact. In a child that has lost a good part
of its parent, another block may matter more or less. So candidates are assembled and measured, and scores are taken
anew around the best of them: what it would gain or lose by each single change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from puzzle_nas.architecture import Architecture, Choice
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.library import assemble, variant_layer
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.training.comparison import ParentReference
from puzzle_nas.training.replacement import ReplacementWalk


class Trials:
    """Assembled children of one run, measured. Nothing is written.

    Args:
        scoring_tokens, selection_tokens: those splits, [S, T].
        batch_tokens: tokens whose activations are in memory together.
    """

    def __init__(
        self,
        run: RunFolder,
        parent: PuzzleForCausalLM,
        scoring_tokens: torch.Tensor,
        selection_tokens: torch.Tensor,
        batch_tokens: int,
    ):
        self.run, self.parent, self.batch_tokens = run, parent, batch_tokens
        self.scoring_tokens = scoring_tokens
        self._reference = ParentReference(parent, selection_tokens)

    def kl_nats(self, architecture: Architecture) -> float:
        """KL(parent || child) on the selection split."""
        return self._reference.compare(assemble(self.run, self.parent, architecture)).kl_nats

    def scores_around(
        self, architecture: Architecture, choices: Iterable[Choice], on_layer: Callable[[], None] = lambda: None
    ) -> dict[Choice, float]:
        """By how many nats the child's KL on the scoring split changes with each single choice; negative is better."""
        choices = list(choices)
        child = assemble(self.run, self.parent, architecture)
        walk = ReplacementWalk(self.parent, self.scoring_tokens, self.batch_tokens, child)
        present = float(walk.model_itself().kl_nats.double().mean())
        scores: dict[Choice, float] = {}
        for layer, block in enumerate(architecture.layers):
            here = [choice for choice in choices if choice[0] == layer]
            changes = [c for c in here if any(block[spec.slot] != spec for spec in c[1])]
            specs = dict.fromkeys(itertools.chain.from_iterable(specs for _, specs in changes))
            blocks = {spec: variant_layer(self.run, self.parent, layer, spec) for spec in specs}
            results = walk.try_variants([{spec.slot: blocks[spec] for spec in specs} for _, specs in changes])
            scores |= dict.fromkeys(here, 0.0)
            for choice, result in zip(changes, results, strict=True):
                scores[choice] = float(result.kl_nats.double().mean()) - present
            on_layer()
            if layer + 1 < len(architecture.layers):
                walk.advance()
        return scores
