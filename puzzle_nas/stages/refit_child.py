"""Closed-form correction of the assembled child, layer by layer on the child's own activations.

Replace-1-block variants were fitted to the parent's activations, but in the child every layer also receives the
errors of those below. One pass solves each output projection anew so that the child's residual stream meets the
parent's at the same depth: W minimising sum w |context W' - (h_parent - h_child)|^2 + ridge |W - W_now|^2, tokens
weighted by 1 / |h_parent|^2. Kept if it lowers KL on the selection split. File: child-refit/.

Shapes: S sequences, T tokens, D hidden, I width of a projection's input.
"""

from __future__ import annotations

import copy
import math
import shutil

import torch
from torch import nn

from puzzle_nas import __version__
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, complete_folder, read_json, write_json
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_model, load_parent, load_tokenizer, machine_of, save_model
from puzzle_nas.families.loading import parent_checkpoint
from puzzle_nas.modeling import PuzzleForCausalLM
from puzzle_nas.modeling.modeling_puzzle import PuzzleAttention, PuzzleLinearAttention, PuzzleLinearMLP
from puzzle_nas.progress import progress
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.model_card import model_card
from puzzle_nas.subblocks.statistics import fast_products
from puzzle_nas.training.comparison import ParentReference

NAME = "refit_child"
COMMAND = "refit"
NEEDS = ("assemble_child",)
SETTINGS = ("refit",)
OUTPUTS = ("refit.json", "child-refit/*")

BATCH_TOKENS = 4096


def refit(parent: PuzzleForCausalLM, child: PuzzleForCausalLM, tokens_ST: torch.Tensor, ridge: float, on_layer) -> None:
    """Correct the child in place, bottom to top."""
    step = max(1, BATCH_TOKENS // tokens_ST.shape[1])
    batches = tokens_ST.split(step)
    with torch.inference_mode():
        parent_hidden = [parent.model.embed_tokens(b.to(parent.device)) for b in batches]
        child_hidden = [h.clone() for h in parent_hidden]
        inputs = parent.model.layer_inputs(parent_hidden[0][:1])
        for theirs, mine in zip(parent.model.layers, child.model.layers, strict=True):
            middle = [theirs.attend(h, **inputs) for h in parent_hidden]
            if mine.self_attn is not None:
                _solve(mine, "attention", child_hidden, middle, inputs, ridge)
            child_hidden = [mine.attend(h, **inputs) for h in child_hidden]
            parent_hidden = [theirs.feed_forward(h) for h in middle]
            if mine.mlp is not None:
                _solve(mine, "ffn", child_hidden, parent_hidden, inputs, ridge)
            child_hidden = [mine.feed_forward(h) for h in child_hidden]
            on_layer()


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


def _solve(layer, slot: str, child_hidden, goal_hidden, inputs, ridge: float) -> None:
    gram, cross, matrix = 0.0, 0.0, None
    for hidden, goal in zip(child_hidden, goal_hidden, strict=True):
        matrix, context = _projection(layer, slot, hidden, inputs)
        x = context.flatten(0, 1).float()
        # What the sub-block should add, less what it adds now.
        error = goal.flatten(0, 1).float() - hidden.flatten(0, 1).float() - matrix(context).flatten(0, 1).float()
        weight = goal.flatten(0, 1).float().norm(dim=-1, keepdim=True).clamp_min(1e-6) ** -2
        weighted = (x * weight).T
        with fast_products(context):
            gram = gram + (weighted @ x).double()
            cross = cross + (weighted @ error).double()
    assert matrix is not None and isinstance(gram, torch.Tensor)
    damping = ridge * gram.diagonal().mean().clamp_min(1e-20)
    change = torch.linalg.solve(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross).T
    # A new tensor: the present one may be shared with the parent.
    matrix.weight = nn.Parameter((matrix.weight.double() + change).to(matrix.weight), requires_grad=False)


def run(recipe: Recipe, run: RunFolder) -> None:
    """Refit a copy; keep it if it is better on the selection split."""
    shutil.rmtree(run / "child-refit", ignore_errors=True)
    if not recipe.refit.enabled:
        write_json(run / "refit.json", {"tried": False, "kept": False})
        return
    parent, shape = load_parent(run, by_layer=True)
    child = load_model(run / "child", machine_of(recipe))
    reference = ParentReference(parent, load_tokens(run, "selection"))
    before = reference.compare(child).kl_nats
    refitted = copy.deepcopy(child)
    with progress("refit, layer", shape.num_hidden_layers) as ticker:
        refit(parent, refitted, load_tokens(run, "calibration"), recipe.refit.ridge, ticker.advance)
    after = reference.compare(refitted).kl_nats
    kept = after < before
    if kept:
        architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
        with complete_folder(run / "child-refit") as partial:
            save_model(refitted, load_tokenizer(parent_checkpoint(run)), partial)
            how = "assembled from the block library, then refitted in closed form"
            (partial / "README.md").write_text(model_card(recipe.parent, architecture, __version__, how))
    write_json(
        run / "refit.json",
        {
            "tried": True,
            "kept": kept,
            "selection_kl_nats_before": before,
            "selection_kl_nats_after": after if math.isfinite(after) else None,
        },
    )
