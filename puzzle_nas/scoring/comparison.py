"""Compare a child with the parent on a split: KL, LM loss, top-1 agreement.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from puzzle_nas.estimates import estimate
from puzzle_nas.families import Anatomy, Head
from puzzle_nas.scoring.replacement import final_states, joined, next_tokens, require_finite
from puzzle_nas.training.losses import Divergence, divergences

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """Means over the tokens of a split; standard error over sequences."""

    kl_nats: float
    kl_nats_standard_error: float | None
    lm_loss_nats: float
    perplexity: float
    top1_agreement: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON form."""
        return asdict(self)


class Evaluable(Protocol):
    """Any model that gives final hidden states and has a head."""

    head: Head
    device: torch.device
    training: bool

    def final_states(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the head receives, [B, T, D]."""
        ...

    def train(self, mode: bool = True) -> Any:
        """As torch's modules."""
        ...

    def eval(self) -> Any:
        """As torch's modules."""
        ...


def head_of(model: PreTrainedModel | Evaluable) -> Head:
    """A model's head."""
    return Anatomy(model).head if isinstance(model, PreTrainedModel) else model.head


def _final(model: PreTrainedModel | Evaluable, tokens_BT: torch.Tensor) -> torch.Tensor:
    if not isinstance(model, PreTrainedModel):
        return model.final_states(tokens_BT.to(model.device))
    (final,) = final_states(model, tokens_BT, len(tokens_BT))
    return final


class ParentReference:
    """The parent's final hidden states on fixed tokens, kept so that many children can be compared with them.

    Args:
        parent: the parent, or only its LM head where `final` is given.
        final: its final hidden states, from an earlier reference's `final`.
    """

    def __init__(
        self,
        parent: PreTrainedModel | Evaluable | Head,
        tokens_ST: torch.Tensor,
        final: Sequence[torch.Tensor] | None = None,
    ):
        self.head = parent if isinstance(parent, Head) else head_of(parent)
        self.tokens_ST = tokens_ST
        self.labels_ST = next_tokens(tokens_ST)
        self.step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        if final is None:
            assert not isinstance(parent, Head)
            final = [_final(parent, batch) for batch in tokens_ST.split(self.step)]
            for states in final:
                require_finite(states)
        self.final = list(final)

    def compare(self, child: PreTrainedModel | Evaluable, on_batch: Callable[[], None] = lambda: None) -> Comparison:
        """Measure one child (or the parent itself)."""
        return summarise(self.divergence(child, on_batch))

    @torch.inference_mode()
    def divergence(
        self, child: PreTrainedModel | Evaluable | None = None, on_batch: Callable[[], None] = lambda: None
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
                head = head_of(child)
                mine = _final(child, batch).flatten(0, 1).to(head.weight.dtype)
            parts += divergences(final.flatten(0, 1), [mine], [self.head, head], labels.flatten().to(final.device))
            on_batch()
        if child is not None:
            child.train(was_training)
        return joined(parts, self.tokens_ST.shape)


def summarise(divergence: Divergence) -> Comparison:
    """Means of per-token figures shaped [S, T]."""
    by_sequence = divergence.kl_nats.double().mean(1)
    lm_loss = divergence.lm_loss_nats[:, :-1].double().mean().item()
    return Comparison(
        kl_nats=by_sequence.mean().item(),
        kl_nats_standard_error=estimate(by_sequence.tolist())["standard_error"],
        lm_loss_nats=lm_loss,
        perplexity=math.exp(min(lm_loss, 700.0)),
        top1_agreement=divergence.top1_agrees.double().mean().item(),
    )
