"""Replace one block of the parent at a time and measure the damage (Puzzle, section 3: replace-1-block scores).

The walk goes up the layers once: what lies below a replaced block is computed once for all variants, the parent's
token distribution once per batch.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.subblocks import run_with
from puzzle_nas.training.losses import Divergence, divergences


def next_tokens(tokens_ST: torch.Tensor) -> torch.Tensor:
    """The label of every position, -100 for the last of each sequence, shape [S, T]."""
    return torch.cat([tokens_ST[:, 1:], torch.full_like(tokens_ST[:, :1], -100)], dim=1)


class ReplacementWalk:
    """Walks the parent upwards over fixed tokens; at each layer variants can be tried."""

    def __init__(self, parent: PuzzleForCausalLM, tokens_ST: torch.Tensor, batch_tokens: int):
        self.parent = parent
        self.labels_ST = next_tokens(tokens_ST)
        self.batch_sequences = max(1, batch_tokens // tokens_ST.shape[1])
        with torch.inference_mode():
            self.hidden_STD = parent.model.embed_tokens(tokens_ST.to(parent.device))
            self.inputs = parent.model.layer_inputs(self.hidden_STD[:1])
            self.final_STD = torch.cat([self._finish(batch, 0) for batch in self._batches(self.hidden_STD)])
        self.layer = 0

    def _batches(self, tensor: torch.Tensor):
        return tensor.split(self.batch_sequences)

    def _finish(self, hidden_BTD: torch.Tensor, layer: int) -> torch.Tensor:
        for block in list(self.parent.model.layers)[layer:]:
            hidden_BTD = block(hidden_BTD, **self.inputs)
        return self.parent.model.norm(hidden_BTD)

    @torch.inference_mode()
    def advance(self) -> None:
        """Go up one layer."""
        block = self.parent.model.layers[self.layer]
        self.hidden_STD = torch.cat([block(batch, **self.inputs) for batch in self._batches(self.hidden_STD)])
        self.layer += 1

    def parent_itself(self) -> Divergence:
        """The parent measured against itself: its LM loss, and a KL of zero; shaped [S, T]."""
        return self._compare([[final] for final in self._batches(self.final_STD)])[0]

    @torch.inference_mode()
    def try_variants(self, variants: Sequence[tuple[str, PuzzleDecoderLayer]]) -> list[Divergence]:
        """The damage of each (slot, sub-block) at the present layer; per token, shaped [S, T]."""
        block = self.parent.model.layers[self.layer]
        return self._compare(
            [
                self._finish(run_with(block, variant, slot, hidden, self.inputs), self.layer + 1)
                for slot, variant in variants
            ]
            for hidden in self._batches(self.hidden_STD)
        )

    @torch.inference_mode()
    def _compare(self, children: Iterable[list[torch.Tensor]]) -> list[Divergence]:
        """Divergences of several children, given batch by batch as final hidden states [B, T, D] of each."""
        labels = self._batches(self.labels_ST.to(self.parent.device))
        parts: list[list[Divergence]] = []
        for final, batch_labels, batch in zip(self._batches(self.final_STD), labels, children, strict=True):
            heads = [self.parent.lm_head] * (1 + len(batch))
            flat = [child.flatten(0, 1) for child in batch]
            parts.append(divergences(final.flatten(0, 1), flat, heads, batch_labels.flatten()))
        return [joined(variant_parts, self.labels_ST.shape) for variant_parts in zip(*parts, strict=True)]


def joined(parts: Sequence[Divergence], shape: torch.Size) -> Divergence:
    """Batches of per-token figures as one, shaped `shape`, on the CPU."""
    fields = ("kl_nats", "lm_loss_nats", "top1_agrees")
    return Divergence(*(torch.cat([getattr(part, name) for part in parts]).view(shape).cpu() for name in fields))
