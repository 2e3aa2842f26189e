"""Muon and AdamW behind one interface: who takes what, resuming, and gradients that are not finite."""

import copy

import pytest
import torch
from torch import nn

from puzzle_nas.recipe import OptimiserSettings
from puzzle_nas.training import optimiser
from puzzle_nas.training.optimiser import Optimiser, learning_rate_at


def module():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed_tokens": nn.Embedding(11, 8), "layer": nn.Linear(8, 12), "norm": nn.LayerNorm(8)})


def train(module, optimiser, steps):
    for step in steps:
        tokens = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        module["layer"](module["norm"](module["embed_tokens"](tokens))).square().mean().backward()
        optimiser.step(step)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_optimiser_ends_with_the_same_bits(name):
    settings = OptimiserSettings(optimiser=name, learning_rate=1e-2, weight_decay=0.1)
    whole = module()
    train(whole, Optimiser(whole, settings, 8), range(8))
    first = module()
    optimiser = Optimiser(first, settings, 8)
    train(first, optimiser, range(5))
    state = copy.deepcopy(optimiser.state())
    second = module()
    optimiser = Optimiser(second, settings, 8)
    optimiser.load(state)
    train(second, optimiser, range(5, 8))
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(second["layer"].weight, module()["layer"].weight)


def test_muon_takes_the_matrices_inside_blocks_and_updates_them_orthogonally():
    settings = OptimiserSettings(optimiser="muon", learning_rate=1e-2, gradient_clip=None)
    before, after = module(), module()
    optimiser = Optimiser(after, settings, 100)
    train(after, optimiser, range(1))
    held = {name.split("/")[1] for name in optimiser.state() if name.startswith("momentum_buffer/")}
    assert held == {"layer.weight"}
    change = (after["layer"].weight - before["layer"].weight).detach()
    scale = learning_rate_at(0, 100, settings) * 0.2 * 12**0.5
    # Newton-Schulz stops at singular values between about 0.7 and 1.2; a LayerNorm's output has one dimension less.
    singular = torch.linalg.svdvals(change)[:-1] / scale
    assert singular.min() > 0.5 and singular.max() < 1.5
    assert not torch.equal(after["embed_tokens"].weight, before["embed_tokens"].weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = module()
    optimiser = Optimiser(model, OptimiserSettings(optimiser="muon"), 10)
    train(model, optimiser, range(2))
    before = copy.deepcopy(optimiser.state())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    last = list(model.parameters())[-1]
    last.grad = torch.full_like(last, bad)
    assert not optimiser.step(2)
    assert all(torch.equal(value, before[name]) for name, value in optimiser.state().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_muon_where_bfloat16_is_slow_is_said_once(monkeypatch, capsys):
    optimiser._say_that_muon_is_slow.cache_clear()
    for fast, said in ((True, 0), (False, 1)):
        monkeypatch.setattr(optimiser, "bfloat16_is_fast", lambda device, fast=fast: fast)
        for _ in range(2):
            Optimiser(module(), OptimiserSettings(optimiser="muon"), 10)
        assert capsys.readouterr().out.count("optimiser=adamw is many times as fast") == said
