"""KL on logits without ever holding them all: computed chunk by chunk from hidden states.

Shapes: N tokens, D hidden, V vocabulary. Hidden states are after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from puzzle_nas.families import Head
from puzzle_nas.training.compilation import compiled_once

MATMUL_ROWS = 512
"""Tokens in one product with the LM head, which is brought into the product's order each time."""
SOFTMAX_ROWS = 2
"""Tokens whose float32 logits a thread has at once: few enough to stay in its cache (2 x 49,152 x 4 B = 0.4 MB)."""


def softmax_rows(device: torch.device) -> int:
    """Tokens whose float32 logits exist at once."""
    return SOFTMAX_ROWS * torch.get_num_threads() if device.type == "cpu" else MATMUL_ROWS


def log_softmax(products_RV: torch.Tensor, head: Head) -> torch.Tensor:
    """Of the logits that a head makes of its products, in float32, [R, V]; one tensor of that size is made."""
    values = head.shaped_(products_RV.to(torch.float32, copy=True))
    return torch.log_softmax(values, dim=-1, out=values)


@dataclass
class Divergence:
    """Per token, [N] float32: KL(parent || child) and cross-entropy in nats, and whether the top-1 token agrees."""

    kl_nats: torch.Tensor
    lm_loss_nats: torch.Tensor
    top1_agrees: torch.Tensor


@torch.no_grad()
def divergences(
    parent_ND: torch.Tensor,
    children_ND: Sequence[torch.Tensor],
    heads: Sequence[Head],
    labels_N: torch.Tensor,
) -> list[Divergence]:
    """How far each child's token distribution is from the parent's. The parent's is computed once for all.

    Args:
        parent_ND: the parent's final hidden states.
        children_ND: the same of each child.
        heads: LM head of the parent, then of each child.
        labels_N: the next token of each position; -100 where there is none (its cross-entropy is 0).
    """
    tokens = parent_ND.shape[0]
    results = [Divergence(*(torch.zeros(tokens, device=parent_ND.device) for _ in range(3))) for _ in children_ND]
    at_once = softmax_rows(parent_ND.device)
    for start in range(0, tokens, MATMUL_ROWS):
        rows = slice(start, start + MATMUL_ROWS)
        products = [head.matrix(hidden[rows]) for head, hidden in zip(heads, [parent_ND, *children_ND], strict=True)]
        for offset in range(0, products[0].shape[0], at_once):
            part = slice(offset, offset + at_once)
            parent_log = log_softmax(products[0][part], heads[0])
            parent_top = parent_log.argmax(-1, keepdim=True)
            parent_p = parent_log.exp()
            place = slice(start + offset, start + offset + parent_p.shape[0])
            target = labels_N[place].clamp_min(0).unsqueeze(1)
            known = labels_N[place] >= 0
            for result, child_products, head in zip(results, products[1:], heads[1:], strict=True):
                child_log = log_softmax(child_products[part], head)
                result.lm_loss_nats[place] = -child_log.gather(1, target).squeeze(1) * known
                result.top1_agrees[place] = (child_log.gather(1, parent_top).squeeze(1) == child_log.amax(-1)).float()
                # Term by term: sums over the vocabulary of both, subtracted, would be off by some 5e-4.
                result.kl_nats[place] = torch.linalg.vecdot(parent_p, torch.sub(parent_log, child_log, out=child_log))
    return results


@dataclass(frozen=True)
class ParentLogits:
    """The parent's final hidden states [N, D] and its head: logits are formed when needed, and not kept."""

    hidden_ND: torch.Tensor
    head: Head

    def chunk(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """What `divergence` needs of R tokens, each tensor [R, ...]."""
        return (self.hidden_ND[rows] @ self.head.weight.T,)

    def divergence(
        self, chunk: tuple[torch.Tensor, ...], child_log_RV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(parent || child) summed over R tokens, and its gradient in the child's logits [R, V]."""
        parent_log = log_softmax(chunk[0], self.head)
        parent_p = parent_log.exp()
        kl = torch.linalg.vecdot(parent_p, parent_log.sub_(child_log_RV)).sum()
        return kl, child_log_RV.exp().sub_(parent_p)


@dataclass(frozen=True)
class ParentTopK:
    """The parent's top K tokens at each position, ids and log-probabilities [N, K], and log of what is left [N].

    All other tokens count as one. This KL is a lower bound of the full one.
    """

    ids_NK: torch.Tensor
    log_p_NK: torch.Tensor
    log_rest_N: torch.Tensor

    def chunk(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """What `divergence` needs of R tokens, each tensor [R, ...]. Stored numbers are rounded: normalised again."""
        logs = torch.cat([self.log_p_NK[rows].float(), self.log_rest_N[rows].float().unsqueeze(1)], dim=1)
        return self.ids_NK[rows].long(), F.log_softmax(logs, dim=-1)

    def divergence(
        self, chunk: tuple[torch.Tensor, ...], child_log_RV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(parent || child) summed over R tokens, and its gradient in the child's logits [R, V]."""
        ids, parent_log = chunk
        parent_p, child_p = parent_log.exp(), child_log_RV.exp()
        # Summed, not subtracted from 1: differences of numbers close to 1 lose their digits.
        child_rest = child_p.scatter(1, ids, 0.0).sum(-1, keepdim=True).clamp_min(1e-12)
        child_log = torch.cat([child_log_RV.gather(1, ids), child_rest.log()], dim=1)
        grad = child_p * (1 - parent_p[:, -1:] / child_rest)
        grad.scatter_(1, ids, child_p.gather(1, ids) - parent_p[:, :-1])
        return torch.linalg.vecdot(parent_p, parent_log - child_log).sum(), grad


def _loss_of_rows(
    divergence: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    head: Head,
    parents: tuple[torch.Tensor, ...],
    child_products_RV: torch.Tensor,
    labels_R: torch.Tensor,
    kl_weight: float,
    lm_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What R tokens add to the loss, scalar, and its gradient in the products of the child's head [R, V]."""
    logits = head.shaped_(child_products_RV.to(torch.float32, copy=True))
    child_log = torch.log_softmax(logits, dim=-1, out=None if head.cap else logits)
    kl, grad = divergence(parents, child_log)
    loss = kl_weight * kl
    grad *= kl_weight
    if lm_weight is not None:
        is_known = (labels_R >= 0).float().unsqueeze(1)
        target = labels_R.clamp_min(0).unsqueeze(1)
        loss = loss - lm_weight * (child_log.gather(1, target) * is_known).sum()
        grad += lm_weight * is_known * child_log.exp()
        grad.scatter_add_(1, target, -lm_weight * is_known)
    return loss, head.slope_(grad, logits).to(child_products_RV.dtype)


class _ChunkedDistillation(torch.autograd.Function):
    """Mean over tokens of kl_weight * KL(parent || child) + lm_weight * cross-entropy.

    Both gradients are known in closed form, softmax(child) minus the target, so they are formed in the forward
    pass, chunk by chunk, and no logits are kept.
    """

    @staticmethod
    def forward(ctx, child_ND, child_weight, head, parent, labels_N, kl_weight, lm_weight, precision, loss_of_rows):
        tokens = child_ND.shape[0]
        known = (labels_N >= 0).sum().clamp_min(1)
        hidden, weight = child_ND.to(precision), child_weight.to(precision)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(child_weight, dtype=torch.float32) if child_weight.requires_grad else None
        total = torch.zeros((), device=child_ND.device)
        at_once = softmax_rows(child_ND.device)
        for start in range(0, tokens, MATMUL_ROWS):
            rows = slice(start, start + MATMUL_ROWS)
            child_logits = hidden[rows] @ weight.T
            chunk = parent.chunk(rows)
            for offset in range(0, child_logits.shape[0], at_once):
                part = slice(offset, offset + at_once)
                parents = tuple(tensor[part] for tensor in chunk)
                weights = (kl_weight / tokens, lm_weight / known if lm_weight else None)
                loss, grad = loss_of_rows(
                    parent.divergence, head, parents, child_logits[part], labels_N[rows][part], *weights
                )
                total += loss
                child_logits[part] = grad
            grad_hidden[rows] = child_logits @ weight
            if grad_weight is not None:
                grad_weight += (child_logits.T @ hidden[rows]).float()
        ctx.save_for_backward(grad_hidden.to(child_ND.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_output,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad_output
        return grad_hidden * grad_output, grad_weight, *[None] * 7


def distillation_loss(
    child_ND: torch.Tensor,
    child_head: Head,
    parent: ParentLogits | ParentTopK,
    labels_N: torch.Tensor,
    kl_weight: float,
    lm_weight: float,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
) -> torch.Tensor:
    """KL and LM loss of Puzzle's section 4, differentiable in the child's hidden states and head, scalar, nats.

    `precision` is that of the product with the child's head. `compiled`: what is done with logits is fused, and so
    passes over them fewer times.
    """
    rows = compiled_once(_loss_of_rows) if compiled else _loss_of_rows
    weights = (kl_weight, lm_weight)
    return _ChunkedDistillation.apply(
        child_ND, child_head.weight, child_head, parent, labels_N, *weights, precision, rows
    )


def _cosine_distance(child_BTD: torch.Tensor, parent_BTD: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(child_BTD.float(), parent_BTD.float(), dim=-1).mean()


def cosine_loss(
    children_BTD: Sequence[torch.Tensor], parents_BTD: Sequence[torch.Tensor], compiled: bool = False
) -> torch.Tensor:
    """Mean over layers and tokens of 1 - cosine of the residual streams after each block (Puzzle, section 4)."""
    distance = compiled_once(_cosine_distance) if compiled else _cosine_distance
    return torch.stack([distance(*pair) for pair in zip(children_BTD, parents_BTD, strict=True)]).mean()


def error_weight(parent_output: torch.Tensor) -> torch.Tensor:
    """What each token's squared error counts in `block_loss`, [...] for outputs [..., D], float32.

    Each token's error is divided by its own energy, so that a few tokens of massive activations cannot own the loss;
    the paper divides by the energy of the whole batch.
    """
    energy = torch.linalg.vector_norm(parent_output.float(), dim=-1).square_()
    return 1 / (energy.numel() * energy.clamp_min(1e-12))


class _WeightedError(torch.autograd.Function):
    """Sum over tokens of weight * |sum of (child - parent)|^2, whose gradient is 2 * weight * error for every child."""

    @staticmethod
    def forward(ctx, weight, parents, *children):
        # Differences are summed, not outputs, so that massive activations cost no precision.
        error, *others = (
            child.to(torch.float32, copy=True).sub_(parent) for child, parent in zip(children, parents, strict=True)
        )
        for other in others:
            error.add_(other)
        ctx.save_for_backward(weight, error)
        ctx.dtypes = [child.dtype for child in children]
        return torch.vdot(weight.flatten(), torch.linalg.vector_norm(error, dim=-1).square_().flatten())

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_output,) = grad_outputs
        weight, error = ctx.saved_tensors
        grad = error.mul_((2 * grad_output * weight).unsqueeze(-1))
        return None, None, *(grad.to(dtype) for dtype in ctx.dtypes)


def block_loss(weight: torch.Tensor, children: Sequence[torch.Tensor], parents: Sequence[torch.Tensor]) -> torch.Tensor:
    """Normalised error of a block's output (Puzzle, section 2): MSE(o_parent, o_child) / MSE(o_parent, 0), scalar.

    Args:
        weight: `error_weight` of the parent's output, [...].
        children, parents: what the block's parts add to the residual stream, in the child and in the parent, each
            [..., D]. Gradients reach the children. To be called outside of autocast.
    """
    return _WeightedError.apply(weight, parents, *children)
