"""Chunked losses against torch's own, unchunked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from puzzle_nas.families import Head
from puzzle_nas.training.losses import (
    ParentLogits,
    ParentTopK,
    block_loss,
    cosine_loss,
    distillation_loss,
    divergences,
    error_weight,
)


@pytest.fixture(params=[(1.0, None), (0.5, 1.5)], ids=["plain", "divided and capped"])
def models(request):
    """Hidden states of three models on 300 tokens, their heads, and labels of which some are missing."""
    torch.manual_seed(0)
    hidden = [torch.randn(300, 32) for _ in range(3)]
    heads = [Head(nn.Linear(32, 500, bias=False), *request.param) for _ in range(3)]
    labels = torch.randint(0, 500, (300,))
    labels[::7] = -100
    return hidden, heads, labels


def logits_of(head, states):
    """As Granite and Gemma 2 write it."""
    logits = head.matrix(states) / head.divisor
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def test_divergences(models):
    hidden, heads, labels = models
    results = divergences(hidden[0], hidden[1:], heads, labels)
    parent = logits_of(heads[0], hidden[0]).log_softmax(-1)
    for result, states, head in zip(results, hidden[1:], heads[1:], strict=True):
        child = logits_of(head, states).log_softmax(-1)
        expected = F.kl_div(child, parent, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(result.kl_nats, expected, rtol=1e-5, atol=1e-5)
        loss = F.cross_entropy(logits_of(head, states), labels, ignore_index=-100, reduction="none")
        torch.testing.assert_close(result.lm_loss_nats, loss, rtol=1e-5, atol=1e-5)
        assert torch.equal(result.top1_agrees, (child.argmax(-1) == parent.argmax(-1)).float())


def test_small_divergences_are_not_lost_in_large_sums():
    """As of a parent against itself in 8 bits: many tokens in the vocabulary, logits far from zero."""
    torch.manual_seed(0)
    hidden = torch.cat([0.6 * torch.randn(64, 64), torch.ones(64, 1)], 1)
    matrix = nn.Linear(65, 49_152, bias=False)
    matrix.weight.data = torch.cat([torch.randn(49_152, 64), torch.full((49_152, 1), 8.0)], 1)
    near = hidden + 1e-3 * torch.randn_like(hidden)
    heads, labels = [Head(matrix, 1.0, None)] * 3, torch.zeros(64, dtype=torch.long)
    itself, other = divergences(hidden, [hidden, near], heads, labels)
    assert not itself.kl_nats.any()
    parent, child = ((h.double() @ matrix.weight.double().T).log_softmax(-1) for h in (hidden, near))
    expected = F.kl_div(child, parent, log_target=True, reduction="none").sum(-1)
    assert other.kl_nats.double().mean().item() == pytest.approx(expected.mean().item(), rel=0.02)


@pytest.mark.parametrize(("kl_weight", "lm_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_distillation_loss_and_both_gradients(models, kl_weight, lm_weight):
    hidden, heads, labels = models
    values = []
    for ours in (True, False):
        states = hidden[1].clone().requires_grad_(True)
        heads[1].matrix.zero_grad()
        if ours:
            loss = distillation_loss(states, heads[1], ParentLogits(hidden[0], heads[0]), labels, kl_weight, lm_weight)
        else:
            logits, parent = logits_of(heads[1], states), logits_of(heads[0], hidden[0]).log_softmax(-1).detach()
            loss = kl_weight * F.kl_div(logits.log_softmax(-1), parent, log_target=True, reduction="batchmean")
            loss = loss + lm_weight * F.cross_entropy(logits, labels, ignore_index=-100)
        loss.backward()
        values.append((loss.detach(), states.grad, heads[1].weight.grad.clone()))
    for mine, theirs in zip(*values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 20, 499])
def test_kl_to_the_likeliest_tokens_with_the_rest_as_one(models, k):
    hidden, heads, labels = models
    parent = logits_of(heads[0], hidden[0]).log_softmax(-1).detach()
    log_p, ids = parent.topk(k)
    states, same = (hidden[1].clone().requires_grad_(True) for _ in range(2))
    kept = torch.zeros(300, 500, dtype=torch.bool).scatter_(1, ids, True)
    target = ParentTopK(ids.int(), log_p, parent.masked_fill(kept, -torch.inf).logsumexp(-1))
    ours = distillation_loss(states, heads[1], target, labels, 1.0, 0.0)
    ours.backward()
    child = logits_of(heads[1], same).log_softmax(-1)
    rest = [torch.logsumexp(logs.masked_fill(kept, -torch.inf), -1, keepdim=True) for logs in (parent, child)]
    merged = [torch.cat([logs.gather(1, ids), last], 1) for logs, last in zip((parent, child), rest, strict=True)]
    theirs = F.kl_div(merged[1], merged[0], log_target=True, reduction="batchmean")
    theirs.backward()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states.grad, same.grad, rtol=1e-3, atol=1e-6)
    full = distillation_loss(hidden[1], heads[1], ParentLogits(hidden[0], heads[0]), labels, 1.0, 0.0)
    assert ours < full if k < 499 else ours.item() == pytest.approx(full.item(), rel=1e-4)


def test_cosine_loss_is_zero_for_the_same_and_two_for_the_opposite():
    states = [torch.randn(2, 5, 8) for _ in range(3)]
    assert cosine_loss(states, states).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss([-s for s in states], states).item() == pytest.approx(2, abs=1e-6)


def test_block_loss_by_token_bounds_what_one_massive_token_can_do():
    output = torch.ones(10, 4)
    output[0] = 1e4
    error = 0.1 * output.clone()
    error[0] = 0

    def loss(error):
        return block_loss(error_weight(output), [output + error], [output]).item()

    assert loss(error) == pytest.approx(0.009)
    assert loss(output) == pytest.approx(1)


def test_block_loss_and_its_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    x, *parents = (torch.randn(2, 5, 8) for _ in range(3))
    children = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    output = x + parents[0] + parents[1]
    error = (children[0] - parents[0]) + (children[1] - parents[1])
    squares, energy = error.square().sum(-1), output.square().sum(-1)
    formula = (squares / energy).mean()
    expected = torch.autograd.grad(3 * formula, children)
    loss = block_loss(error_weight(output), children, parents)
    assert loss.item() == pytest.approx(formula.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(3 * loss, children), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
