"""Closed-form initialisations against brute force, on the tiny trained parent and its own text."""

import pytest
import torch

from puzzle_nas.architecture import GatedFFN, GroupedAttention, LinearAttention, LinearFFN
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.subblocks import LayerContext, observe_layer, subblock_layer, variant_of
from puzzle_nas.subblocks.ffn import removal_order
from puzzle_nas.subblocks.statistics import add_observations

SPECS = [GroupedAttention(1), LinearAttention(), GatedFFN(160), GatedFFN(32), LinearFFN()]


@pytest.fixture(scope="module")
def layer_one(tiny_run):
    """(context of layer 1, its activations on calibration text)."""
    parent, _ = load_parent(RunFolder(tiny_run))
    with torch.no_grad():
        hidden = parent.model.embed_tokens(load_tokens(RunFolder(tiny_run), "calibration"))
        inputs = parent.model.layer_inputs(hidden[:1])
        hidden = parent.model.layers[0](hidden, **inputs)
        layer = parent.model.layers[1]
        activations = observe_layer(layer, hidden, inputs)
        statistics = {}
        observations = {}
        for spec in SPECS:
            observations |= variant_of(spec).observations(spec, layer)
        add_observations(statistics, observations, activations)
    return LayerContext(parent.config, layer, statistics, 1e-6), activations


def error_of(spec, weights, context, activations):
    """Mean squared error of the sub-block's output."""
    block = subblock_layer(context.config, "full_attention", spec, weights)
    with torch.no_grad():
        if spec.slot == "attention":
            out = block.self_attn(activations.attention_in_BTD, **activations.inputs)[0].flatten(0, 1)
            return (out - activations.attention_out_ND).square().mean().item()
        return (block.mlp(activations.ffn_in_ND) - activations.ffn_out_ND).square().mean().item()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_least_squares_beats_the_papers_initialisation(spec, layer_one):
    context, activations = layer_one
    variant = variant_of(spec)
    paper = error_of(spec, variant.paper(spec, context), context, activations)
    ours = min(error_of(spec, w, context, activations) for w in variant.least_squares(spec, context).values())
    assert ours < paper


def test_linear_attention_is_torchs_own_least_squares_solution(layer_one):
    context, activations = layer_one
    solved = variant_of(LinearAttention()).least_squares(LinearAttention(), context)["linear"]
    x, y = activations.attention_in_ND.double(), activations.attention_out_ND.double()
    expected = torch.linalg.lstsq(x, y).solution.T
    residual = (x @ solved["self_attn.linear_attn.weight"].double().T - y).square().mean()
    best = (x @ expected.T - y).square().mean()
    assert residual.item() == pytest.approx(best.item(), rel=1e-3)


def test_full_width_gives_the_parent_back(layer_one):
    context, activations = layer_one
    spec = GatedFFN(341)
    assert error_of(spec, variant_of(spec).paper(spec, context), context, activations) < 1e-10
    solved = variant_of(spec).least_squares(spec, context)["channels"]
    assert error_of(spec, solved, context, activations) < 1e-6


def test_removal_order_drops_what_costs_least():
    """One channel that copies another, one that is never used, and one that matters little, by brute force."""
    torch.manual_seed(0)
    x = torch.randn(500, 40, dtype=torch.double)
    x[:, 7] = x[:, 3]
    x[:, 11] = 0
    down = torch.randn(6, 40, dtype=torch.double)
    down[:, 20] *= 1e-3
    order = removal_order(x.T @ x, down, 1e-9).tolist()
    assert sorted(order) == list(range(40))
    kept = set(order[:8])
    assert 11 not in kept and 20 not in kept and not {3, 7} <= kept


def test_paper_merge_is_the_mean_of_neighbouring_heads(layer_one):
    context, _ = layer_one
    merged = variant_of(GroupedAttention(1)).paper(GroupedAttention(1), context)["self_attn.k_proj.weight"]
    parent = context.layer.self_attn.k_proj.weight
    torch.testing.assert_close(merged, (parent[:32] + parent[32:]) / 2)


def test_least_squares_keeps_one_head_of_each_group(layer_one):
    context, _ = layer_one
    solved = variant_of(GroupedAttention(1)).least_squares(GroupedAttention(1), context)
    parent = context.layer.self_attn.k_proj.weight
    for head in range(2):
        kept = solved[f"head_{head}"]["self_attn.k_proj.weight"]
        torch.testing.assert_close(kept, parent[32 * head : 32 * (head + 1)])
