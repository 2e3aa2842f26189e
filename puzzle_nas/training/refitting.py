"""Closed-form correction of an assembled child, layer by layer on the child's own activations. Beyond the paper.

Replace-1-block variants were fitted to the parent's activations, but in the child every layer also receives the
errors of those below. One pass solves each output projection anew so that the child's residual stream meets the
parent's at the same depth: W minimising sum w |context W' - (h_parent - h_child)|^2 + ridge |W - W_now|^2, tokens
weighted by 1 / |h_parent|^2. The ridge is the mean diagonal of so many tokens' Gram matrix.

Shapes: S sequences, B of them in a batch, T tokens, D hidden, I width of a projection's input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from puzzle_nas.architecture import SLOTS
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleAttention, PuzzleLinearAttention, PuzzleLinearMLP
from puzzle_nas.subblocks.statistics import fast_products, inverse_norm

BATCH_TOKENS = 4096


def refit(
    parent: PuzzleForCausalLM,
    child: PuzzleForCausalLM,
    tokens_ST: torch.Tensor,
    ridge_tokens: float,
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """Correct the child in place, bottom to top. Weights that it shares with the parent are replaced, not changed."""
    ridge = ridge_tokens / tokens_ST.numel()
    batches = tokens_ST.split(max(1, BATCH_TOKENS // tokens_ST.shape[1]))
    with torch.inference_mode():
        parent_hidden = [parent.model.embed_tokens(batch.to(parent.device)) for batch in batches]
        child_hidden = parent_hidden
        inputs = parent.model.layer_inputs(parent_hidden[0][:1])
        for theirs, mine in zip(parent.model.layers, child.model.layers, strict=True):
            for slot in SLOTS:
                if slot == "attention":
                    parent_hidden = [theirs.attend(h, **inputs) for h in parent_hidden]
                else:
                    parent_hidden = [theirs.feed_forward(h) for h in parent_hidden]
                child_hidden = _corrected(mine, slot, child_hidden, parent_hidden, inputs, ridge)
            on_layer()


def _corrected(
    layer, slot: str, hidden: list[torch.Tensor], goal: list[torch.Tensor], inputs, ridge: float
) -> list[torch.Tensor]:
    """Solve the last matrix of a sub-block; the residual stream after it, each [B, T, D]."""
    if (layer.self_attn if slot == "attention" else layer.mlp) is None:
        return hidden
    parts = [_projection(layer, slot, h, inputs) for h in hidden]
    matrix, contexts = parts[0][0], [context for _, context in parts]
    added = [matrix(context) for context in contexts]
    reached = [h + a for h, a in zip(hidden, added, strict=True)]
    if all(map(torch.equal, reached, goal)):
        # Still below the child's first change.
        return reached
    gram, cross = 0.0, 0.0
    for h, context, now, wanted in zip(hidden, contexts, added, goal, strict=True):
        x = context.flatten(0, 1).float()
        error = (wanted.float() - h.float() - now.float()).flatten(0, 1)
        weighted = (x * inverse_norm(wanted.flatten(0, 1), 2)[:, None]).T
        with fast_products(context):
            gram = gram + (weighted @ x).double()
            cross = cross + (weighted @ error).double()
    assert isinstance(gram, torch.Tensor)
    damping = ridge * gram.diagonal().mean().clamp_min(1e-20)
    change = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross).T
    # A new tensor: the present one may be shared with the parent.
    matrix.weight = nn.Parameter((matrix.weight.double() + change).to(matrix.weight), requires_grad=False)
    return [h + matrix(context) for h, context in zip(hidden, contexts, strict=True)]


def _projection(layer, slot: str, hidden: torch.Tensor, inputs) -> tuple[nn.Linear, torch.Tensor]:
    """The last matrix of a sub-block and what it receives, [B, T, I]."""
    if slot == "ffn":
        x = layer.post_attention_layernorm(hidden)
        if isinstance(layer.mlp, PuzzleLinearMLP):
            return layer.mlp.linear_mlp, x
        return layer.mlp.down_proj, layer.mlp.channels(x)
    x = layer.input_layernorm(hidden)
    if isinstance(layer.self_attn, PuzzleLinearAttention):
        return layer.self_attn.linear_attn, x
    assert isinstance(layer.self_attn, PuzzleAttention)
    masks = {**inputs, "attention_mask": inputs["attention_mask"].get(layer.layer_type)}
    return layer.self_attn.o_proj, layer.self_attn.context(x, **masks)[0]
