"""Compare a child with the parent on a split: KL, LM loss, top-1 agreement.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.training.losses import Divergence, divergences
from puzzle_nas.training.replacement import final_states, joined, next_tokens, require_finite

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """Means over the tokens of a split; standard error over sequences."""

    kl_nats: float
    kl_nats_standard_error: float
    lm_loss_nats: float
    perplexity: float
    top1_agreement: float

    def to_dict(self) -> dict[str, float]:
        """JSON form."""
        return asdict(self)


class ParentReference:
    """The parent's final hidden states on fixed tokens, kept so that many children can be compared with them.

    Args:
        parent: the parent, or only its LM head where `final` is given.
        final: its final hidden states, from an earlier reference's `final`.
    """

    def __init__(
        self,
        parent: PuzzleForCausalLM | nn.Linear,
        tokens_ST: torch.Tensor,
        final: Sequence[torch.Tensor] | None = None,
    ):
        self.head = parent if isinstance(parent, nn.Linear) else parent.lm_head
        self.tokens_ST = tokens_ST
        self.labels_ST = next_tokens(tokens_ST)
        self.step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        if final is None:
            final = final_states(parent, tokens_ST, self.step)
            for states in final:
                require_finite(states)
        self.final = list(final)

    @staticmethod
    def _final(model: PuzzleForCausalLM, batch: torch.Tensor) -> torch.Tensor:
        return model.model(batch.to(model.device), use_cache=False).last_hidden_state

    def compare(self, child: PuzzleForCausalLM, on_batch: Callable[[], None] = lambda: None) -> Comparison:
        """Measure one child (or the parent itself)."""
        return summarise(self.divergence(child, on_batch))

    @torch.inference_mode()
    def divergence(
        self, child: PuzzleForCausalLM | None = None, on_batch: Callable[[], None] = lambda: None
    ) -> Divergence:
        """Per-token figures of one child, or of the parent itself without another forward pass; shaped [S, T]."""
        was_training = child is not None and child.training
        if child is not None:
            child.eval()
        parts: list[Divergence] = []
        for batch, labels, final in zip(
            self.tokens_ST.split(self.step), self.labels_ST.split(self.step), self.final, strict=True
        ):
            mine, head = final.flatten(0, 1), self.head
            if child is not None:
                mine, head = self._final(child, batch).flatten(0, 1).to(child.lm_head.weight.dtype), child.lm_head
            parts += divergences(final.flatten(0, 1), [mine], [self.head, head], labels.flatten().to(final.device))
            on_batch()
        if child is not None:
            child.train(was_training)
        return joined(parts, self.tokens_ST.shape)


def summarise(divergence: Divergence) -> Comparison:
    """Means of per-token figures shaped [S, T]."""
    by_sequence = divergence.kl_nats.double().mean(1)
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean().item()
    count = len(by_sequence)
    return Comparison(
        kl_nats=by_sequence.mean().item(),
        kl_nats_standard_error=(by_sequence.std() / math.sqrt(count)).item() if count > 1 else 0.0,
        lm_loss_nats=lm_loss,
        perplexity=math.exp(min(lm_loss, 700.0)),
        top1_agreement=divergence.top1_agrees.double().mean().item(),
    )
