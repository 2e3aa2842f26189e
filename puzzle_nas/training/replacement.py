"""Replace one block at a time and measure the damage (Puzzle, section 3: replace-1-block scores).

The walk goes up the layers once: what lies below a replaced block is computed once for all variants, the parent's
token distribution once per batch. The blocks replaced are the parent's, or those of a child.

Shapes: S sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from puzzle_nas.errors import CheckpointError
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleDecoderLayer
from puzzle_nas.subblocks import run_with
from puzzle_nas.training.losses import Divergence, divergences


def next_tokens(tokens_ST: torch.Tensor) -> torch.Tensor:
    """The label of every position, -100 for the last of each sequence, shape [S, T]."""
    return torch.cat([tokens_ST[:, 1:], torch.full_like(tokens_ST[:, :1], -100)], dim=1)


def require_finite(parent_output: torch.Tensor) -> None:
    """Refuse a parent whose own output overflows: nothing can be learnt from it.

    Raises:
        CheckpointError: it has NaN or infinity.
    """
    if not parent_output.isfinite().all():
        precision = str(parent_output.dtype).removeprefix("torch.")
        way_out = "set precision=float32" if precision != "float32" else "its weights are damaged"
        raise CheckpointError(f"The parent computes NaN or infinity in {precision} on this run's text; {way_out}.")


class ReplacementWalk:
    """Walks a model upwards over fixed tokens; at each layer variants can be tried.

    Args:
        model: in which blocks are replaced; None means the parent itself.
    """

    def __init__(
        self,
        parent: PuzzleForCausalLM,
        tokens_ST: torch.Tensor,
        batch_tokens: int,
        model: PuzzleForCausalLM | None = None,
    ):
        self.parent, self.model = parent, model or parent
        self.labels_ST = next_tokens(tokens_ST)
        self.batch_sequences = max(1, batch_tokens // tokens_ST.shape[1])
        with torch.inference_mode():
            self.hidden_STD = parent.model.embed_tokens(tokens_ST.to(parent.device))
            self.inputs = parent.model.layer_inputs(self.hidden_STD[:1])
            batches = self._batches(self.hidden_STD)
            self.final_STD = torch.cat([self._finish(parent, batch, 0) for batch in batches])
            require_finite(self.final_STD)
        self.layer = 0

    def _batches(self, tensor: torch.Tensor):
        return tensor.split(self.batch_sequences)

    def _finish(self, model: PuzzleForCausalLM, hidden_BTD: torch.Tensor, layer: int) -> torch.Tensor:
        for block in list(model.model.layers)[layer:]:
            hidden_BTD = block(hidden_BTD, **self.inputs)
        return model.model.norm(hidden_BTD)

    @torch.inference_mode()
    def advance(self) -> None:
        """Go up one layer."""
        block = self.model.model.layers[self.layer]
        self.hidden_STD = torch.cat([block(batch, **self.inputs) for batch in self._batches(self.hidden_STD)])
        self.layer += 1

    def model_itself(self) -> Divergence:
        """The model with nothing replaced; per token, shaped [S, T]."""
        return self.try_variants([{}])[0]

    @torch.inference_mode()
    def try_variants(self, variants: Sequence[Mapping[str, PuzzleDecoderLayer]]) -> list[Divergence]:
        """The damage of each replacement, sub-blocks by slot, at the present layer; per token, shaped [S, T]."""
        block = self.model.model.layers[self.layer]
        return self._compare(
            [
                self._finish(self.model, run_with(block, replaced, hidden, self.inputs), self.layer + 1)
                for replaced in variants
            ]
            for hidden in self._batches(self.hidden_STD)
        )

    @torch.inference_mode()
    def _compare(self, children: Iterable[list[torch.Tensor]]) -> list[Divergence]:
        """Divergences of several children, given batch by batch as final hidden states [B, T, D] of each."""
        labels = self._batches(self.labels_ST.to(self.parent.device))
        parts: list[list[Divergence]] = []
        for final, batch_labels, batch in zip(self._batches(self.final_STD), labels, children, strict=True):
            heads = [self.parent.lm_head, *[self.model.lm_head] * len(batch)]
            flat = [child.flatten(0, 1) for child in batch]
            parts.append(divergences(final.flatten(0, 1), flat, heads, batch_labels.flatten()))
        return [joined(variant_parts, self.labels_ST.shape) for variant_parts in zip(*parts, strict=True)]


def joined(parts: Sequence[Divergence], shape: torch.Size) -> Divergence:
    """Batches of per-token figures as one, shaped `shape`, on the CPU."""
    fields = ("kl_nats", "lm_loss_nats", "top1_agrees")
    return Divergence(*(torch.cat([getattr(part, name) for part in parts]).view(shape).cpu() for name in fields))
