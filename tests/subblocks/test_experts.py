"""Mixtures of experts: what their variants compute, against the parent's own router with experts masked."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_nas.families import Anatomy, architecture_of, child_config
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.search_space import build_search_space
from puzzle_nas.specs import Mixture, NoOp
from puzzle_nas.subblocks import (
    Context,
    Origin,
    add_observations,
    made_subblock,
    observed,
    variant_of,
)
from puzzle_nas.subblocks.experts import RANKINGS, Routed, channels_of, router_name, with_experts
from puzzle_nas.training.distillation import freeze_mixtures
from tests.families.parents import parent_of

LAYER = 1
TOKENS = torch.randint(2, 99, (6, 16), generator=torch.Generator().manual_seed(1))
HALF, SPARSER, NARROWER = Mixture(4, 2, 24), Mixture(8, 1, 24), Mixture(8, 2, 12)
ONE = Mixture(1, 1, 24)
OWN = Mixture(8, 2, 24)


@pytest.fixture(params=["qwen3_moe, dense first layer", "mixtral", "olmoe", "gpt_oss"])
def parent(request):
    return parent_of(request.param)


@pytest.fixture
def context(parent):
    """Of layer 1's mixture, with what was observed of it."""
    parts = Anatomy(parent)
    origin, statistics = Origin(parent, LAYER, "experts"), {}
    inputs = parts.inputs(TOKENS.shape[1])
    hidden = parts.layers[0](parts.embed(TOKENS), **inputs[0].layer)
    activations, _ = observed(list(parts.subblocks(LAYER).values()), hidden, inputs[LAYER])
    add_observations(statistics, variant_of(OWN).observations(OWN, origin), activations["experts"])
    return Context(origin, statistics, 1e-4)


def gave(subblock, context):
    """The mixture's output on the observed tokens, [N, D]."""
    output = subblock.mixer(context.statistics["tokens"].gram.unsqueeze(0))
    return (output[0] if subblock.place.pair else output).squeeze(0)


def masked(context, kept):
    """The parent's mixture, its own router seeing logits of minus infinity for experts that are not kept."""
    mixer = context.origin.mixer
    router = getattr(mixer, router_name(mixer))
    gone = torch.tensor([number not in kept for number in range(8)])
    linear = torch.nn.functional.linear
    try:
        torch.nn.functional.linear = lambda *args: linear(*args).masked_fill(gone, -torch.inf)
        _, weights, numbers = router(context.statistics["tokens"].gram)
    finally:
        torch.nn.functional.linear = linear
    return mixer.experts(context.statistics["tokens"].gram, numbers, weights)


def test_all_experts_kept_are_the_parent(context):
    weights = with_experts(context.origin, torch.arange(8).flip(0))
    assert all(torch.equal(weights[name], w) for name, w in context.origin.weights.items())


@pytest.mark.parametrize("kept", [[0, 3, 4, 6], [5, 7]])
def test_fewer_experts_compute_what_the_parent_does_with_a_masked_router(context, kept):
    spec = Mixture(len(kept), 2, 24)
    fewer = made_subblock(context.origin.parent, LAYER, spec, with_experts(context.origin, torch.tensor(kept)))
    torch.testing.assert_close(gave(fewer, context), masked(context, kept), rtol=1e-5, atol=1e-5)


def test_harm_is_the_error_with_one_more_expert_masked(context):
    tokens = context.statistics["tokens"]
    routed = Routed.of(context.origin.subblock, tokens)
    present, gone = list(range(8)), torch.zeros(8, dtype=torch.bool)

    def error(kept):
        return ((masked(context, kept) - tokens.cross).square().sum(1) / tokens.cross.square().sum(1)).sum()

    for lost in (None, 2, 5):
        if lost is not None:
            present.remove(lost)
            gone[lost] = True
        harm = routed.harm(gone)
        for expert in present:
            expected = error([number for number in present if number != expert]) - error(present)
            torch.testing.assert_close(harm[expert], expected, rtol=1e-3, atol=1e-4)
        assert torch.isinf(harm[gone]).all()


def test_elimination_keeps_no_worse_a_half_than_the_mean_one(context):
    tokens = context.statistics["tokens"]
    errors = {
        half: (masked(context, half) - tokens.cross).norm(dim=1).div(tokens.cross.norm(dim=1)).square().sum()
        for half in itertools.combinations(range(8), 4)
    }
    routed = Routed.of(context.origin.subblock, tokens)
    kept = {name: tuple(sorted(rank(routed)[:4].tolist())) for name, rank in RANKINGS.items()}
    assert all(sorted(rank(routed).tolist()) == list(range(8)) for rank in RANKINGS.values())
    # Of the 70 halves, one of the best ten.
    assert errors[kept["elimination"]] <= sorted(errors.values())[9]


def test_reap_is_the_mean_of_weight_times_norm_over_an_experts_tokens(context):
    x, mixer = context.statistics["tokens"].gram, context.origin.mixer
    _, weights, numbers = getattr(mixer, router_name(mixer))(x)
    found = []
    for expert in range(8):
        token, place = (numbers == expert).nonzero(as_tuple=True)
        alone = mixer.experts(x[token], torch.full((len(token), 1), expert), weights[token, place, None])
        found.append(alone.norm(dim=1).mean() if len(token) else torch.tensor(0.0))
    expected = torch.stack(found).argsort(descending=True)
    assert torch.equal(RANKINGS["reap"](Routed.of(context.origin.subblock, context.statistics["tokens"])), expected)


def test_channels_are_what_the_last_matrix_receives(context):
    x, experts = context.statistics["tokens"].gram, context.origin.mixer.experts
    down = experts.down_proj[3]
    expected = channels_of(experts, 3, x) @ (down if experts.is_transposed else down.T)
    if experts.has_bias:
        expected = expected + experts.down_proj_bias[3]
    alone = experts(x, torch.full((len(x), 1), 3), torch.ones(len(x), 1))
    torch.testing.assert_close(expected, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [HALF, SPARSER, NARROWER, ONE], ids=lambda spec: spec.id)
def test_least_squares_is_nearest_to_the_parent(context, spec):
    candidates = variant_of(spec).least_squares(spec, context)
    wanted = context.statistics["tokens"].cross
    errors = {}
    for name, weights in candidates.items():
        subblock = made_subblock(context.origin.parent, LAYER, spec, weights)
        errors[name] = ((gave(subblock, context) - wanted).norm(dim=1) / wanted.norm(dim=1)).square().mean().item()
    assert min(errors, key=errors.__getitem__) == "least_squares"
    random = variant_of(spec).random(spec, context, torch.Generator().manual_seed(0))
    assert {name: w.shape for name, w in random.items()} == {
        name: w.shape for name, w in candidates["least_squares"].items()
    }


def test_what_is_offered_changes_one_size(parent):
    asked = SearchSpaceSettings(width_fractions=[0.5], expert_counts=[0.5, 1], experts_per_token=[1])
    space = build_search_space(architecture_of(parent.config), asked, linear={"ffn"}, no_op={"experts"}, layers={})
    assert space.options[LAYER]["experts"] == (OWN, HALF, ONE, SPARSER, NARROWER, NoOp("experts"))
    # Of Qwen3-MoE's three layers, the first is dense: a slot and a cost group of its own.
    is_dense = parent.config.model_type == "qwen3_moe"
    assert (set(space.options[0]) == {"attention", "ffn"}) == is_dense
    if parent.config.model_type != "gpt_oss":
        assert architecture_of(parent.config).groups == ((0, 1, 1) if is_dense else (0, 0, 0))


def test_routers_and_experts_can_be_frozen(context):
    parent = context.origin.parent
    architecture = architecture_of(parent.config).replaced(LAYER, HALF)
    child = AutoModelForCausalLM.from_config(child_config(parent.config, architecture))
    freeze_mixtures(child)
    trained = {name for name, parameter in child.named_parameters() if parameter.requires_grad}
    assert not any(".experts." in name or ".gate." in name or ".router." in name for name in trained)
    assert f"model.layers.{LAYER}.self_attn.q_proj.weight" in trained
