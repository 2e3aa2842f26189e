"""AdamW: resuming, and gradients that are not finite."""

import copy

import pytest
import torch
from torch import nn

from puzzle_nas.training.optimiser import Optimiser


def module():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed_tokens": nn.Embedding(11, 8), "layer": nn.Linear(8, 12), "norm": nn.LayerNorm(8)})


def train(module, optimiser, steps):
    for step in steps:
        tokens = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        module["layer"](module["norm"](module["embed_tokens"](tokens))).square().mean().backward()
        optimiser.step(step)


def test_a_resumed_optimiser_ends_with_the_same_bits():
    whole = module()
    train(whole, Optimiser(whole, 1e-2, 8), range(8))
    first = module()
    optimiser = Optimiser(first, 1e-2, 8)
    train(first, optimiser, range(5))
    state = copy.deepcopy(optimiser.state())
    second = module()
    optimiser = Optimiser(second, 1e-2, 8)
    optimiser.load(state)
    train(second, optimiser, range(5, 8))
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(second["layer"].weight, module()["layer"].weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = module()
    optimiser = Optimiser(model, 1e-4, 10)
    train(model, optimiser, range(2))
    before = copy.deepcopy(optimiser.state())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    last = list(model.parameters())[-1]
    last.grad = torch.full_like(last, bad)
    assert not optimiser.step(2)
    assert all(torch.equal(value, before[name]) for name, value in optimiser.state().items())
    assert all(parameter.grad is None for parameter in model.parameters())
