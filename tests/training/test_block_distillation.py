"""BLD's loss and step on one layer of a small random parent, against the formula written out."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle_nas.families import Anatomy
from puzzle_nas.recipe import BLDSettings
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp
from puzzle_nas.subblocks import run_with, subblock_weights
from puzzle_nas.training import block_steps
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Steps, Trainee
from tests.conftest import OneByOne

PARENT = (GroupedAttention(2), GatedFFN(96))
EVERY = torch.arange(8)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def task(request, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    parent = LlamaForCausalLM(config).to(request.param).eval().requires_grad_(False)
    activations = LayerActivations(parent, torch.randint(0, 64, (8, 16)), tmp_path)
    activations.climb_to(0)
    return BlockTask(activations, request.param == torch.bfloat16)


def trainee_of(task, *specs, steps=30):
    parent = task.activations.parent
    attention, ffn = (subblock_weights(task.parents[slot]) for slot in ("attention", "ffn"))
    narrow = {n: w[:, :32] if "down" in n else w[:32] if "proj" in n else w for n, w in ffn.items()}
    norm = {name: w for name, w in attention.items() if "layernorm" in name}
    starts = {
        GroupedAttention(2): attention,
        Linear("attention"): {**norm, "self_attn.linear.weight": 0.1 * torch.eye(32, dtype=parent.dtype)},
        GatedFFN(96): ffn,
        GatedFFN(32): narrow,
    }
    start = {name: w for spec in specs for name, w in starts.get(spec, {}).items()}
    return Trainee(Job(specs, Path(), dict, {}), start, parent, 0, BLDSettings(learning_rate=3e-3), steps)


@pytest.mark.parametrize("specs", [PARENT[:1], PARENT[1:], PARENT], ids=str)
def test_the_parents_own_has_no_loss(task, specs):
    assert task.loss(trainee_of(task, *specs), task.fetch(EVERY)).item() < 1e-10


@pytest.mark.parametrize(
    "specs",
    [
        (GatedFFN(32),),
        (Linear("attention"),),
        (GroupedAttention(2), GatedFFN(32)),
        (NoOp("attention"), GatedFFN(32)),
        (Linear("attention"), NoOp("ffn")),
    ],
    ids=str,
)
def test_the_loss_is_the_formulas_and_falls_and_norms_stay(task, specs):
    trainee = trainee_of(task, *specs)
    files = (task.activations.x, *task.activations.added.values())
    before = [file.tensor.clone() for file in files]
    x_dtype = before[0].dtype
    x, attention, ffn = (tensor.float() for tensor in before)
    with torch.no_grad():
        inputs = Anatomy(task.activations.parent.float()).inputs(16)[0]
        output = run_with(list(task.parents.values()), trainee.subblocks, x, inputs)
    task.activations.parent.to(x_dtype)
    parents = x + attention + ffn
    expected = ((output - parents).square().sum(-1) / parents.square().sum(-1)).mean().item()
    losses = []
    for step in range(30):
        loss = task.loss(trainee, task.fetch(EVERY))
        loss.backward()
        trainee.optimiser.step(step)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=1e-4 if x_dtype == torch.float32 else 0.02)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(file.tensor, tensor) for file, tensor in zip(files, before, strict=True))
    after = trainee.weights(x_dtype)
    assert after.keys() == trainee.start.keys()
    assert all(torch.equal(after[name], w) == ("layernorm" in name) for name, w in trainee.start.items())


def test_captured_steps_are_the_same_whoever_is_ahead_and_whatever_is_not_finite(task, monkeypatch):
    monkeypatch.setattr(block_steps, "StepGraph", OneByOne)
    monkeypatch.setattr(block_steps, "side_by_side", lambda works: [work() for work in works])

    def trained(captured):
        trainees = [trainee_of(task, spec, steps=8) for spec in (GatedFFN(32), Linear("attention"))]
        steps, made = Steps(task, trainees, 4), OneByOne.made
        steps.can_capture = captured
        x = task.activations.x.tensor
        for step in range(8):
            sequences = torch.arange(4) + step % 4 if step < 7 else torch.arange(3)
            kept = x[3, 0, 0].clone()
            x[3, 0, 0] = torch.nan if step == 4 else kept
            # The first trainee has come one step further before.
            steps.take(step, sequences, trainees[1:] if step == 0 else trainees)
            x[3, 0, 0] = kept
        assert OneByOne.made == made + captured
        return trainees

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        losses = ours.read_losses()
        torch.testing.assert_close(losses, theirs.read_losses(), rtol=0, atol=0, equal_nan=True)
        assert [loss for loss in losses if loss != loss] == losses[-4:-3]
        for name, weight in ours.weights(torch.float32).items():
            assert torch.equal(weight, theirs.weights(torch.float32)[name]) and weight.isfinite().all()
