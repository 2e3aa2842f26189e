"""Closed-form initialisations against brute force, on the tiny trained parent and its own text."""

import pytest
import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import Anatomy, load_parent
from puzzle_nas.pipeline import open_run
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear
from puzzle_nas.subblocks import Context, Origin, add_observations, made_subblock, observed, variant_of
from puzzle_nas.subblocks.ffn import removal_order

SPECS = [GroupedAttention(1), Linear("attention"), GatedFFN(160), GatedFFN(32), Linear("ffn")]


@pytest.fixture(scope="module")
def layer_one(tiny_run):
    """By slot: (context of layer 1, its activations on calibration text)."""
    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    tokens = load_tokens(run, "calibration")
    parts = Anatomy(parent)
    inputs = parts.inputs(tokens.shape[1])
    with torch.no_grad():
        hidden = parts.layers[0](parts.embed(tokens), **inputs[0].layer)
        activations, _ = observed(list(parts.subblocks(1).values()), hidden, inputs[1])
        found = {}
        for slot in activations:
            origin, statistics, observations = Origin(parent, 1, slot), {}, {}
            for spec in SPECS:
                if spec.slot == slot:
                    observations |= variant_of(spec).observations(spec, origin)
            add_observations(statistics, observations, activations[slot])
            found[slot] = Context(origin, statistics, 1e-6), activations[slot]
    return found


def error_of(spec, weights, context, activations):
    """Mean squared error of the sub-block's output."""
    subblock = made_subblock(context.origin.parent, 1, spec, weights)
    with torch.no_grad():
        out = subblock.mixed(activations.read_BTD, activations.inputs).flatten(0, 1)
    return (out - activations.mixed_ND).square().mean().item()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.id)
def test_least_squares_beats_the_papers_initialisation(spec, layer_one):
    context, activations = layer_one[spec.slot]
    variant = variant_of(spec)
    paper = error_of(spec, variant.paper(spec, context), context, activations)
    ours = min(error_of(spec, w, context, activations) for w in variant.least_squares(spec, context).values())
    assert ours < paper


def test_linear_attention_is_torchs_own_least_squares_solution(layer_one):
    context, activations = layer_one["attention"]
    solved = variant_of(Linear("attention")).least_squares(Linear("attention"), context)["linear"]
    x, y = activations.read_ND.double(), activations.mixed_ND.double()
    expected = torch.linalg.lstsq(x, y).solution.T
    residual = (x @ solved["self_attn.linear.weight"].double().T - y).square().mean()
    best = (x @ expected.T - y).square().mean()
    assert residual.item() == pytest.approx(best.item(), rel=1e-3)


def test_full_width_gives_the_parent_back(layer_one):
    context, activations = layer_one["ffn"]
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
    context, _ = layer_one["attention"]
    merged = variant_of(GroupedAttention(1)).paper(GroupedAttention(1), context)["self_attn.k_proj.weight"]
    parent = context.origin.mixer.k_proj.weight
    torch.testing.assert_close(merged, (parent[:32] + parent[32:]) / 2)


def test_least_squares_keeps_one_head_of_each_group(layer_one):
    context, _ = layer_one["attention"]
    solved = variant_of(GroupedAttention(1)).least_squares(GroupedAttention(1), context)
    parent = context.origin.mixer.k_proj.weight
    for head in range(2):
        kept = solved[f"head_{head}"]["self_attn.k_proj.weight"]
        torch.testing.assert_close(kept, parent[32 * head : 32 * (head + 1)])
