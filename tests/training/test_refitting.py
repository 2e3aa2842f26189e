"""The closed-form correction, against the least-squares problem solved by torch."""

import pytest
import torch

from puzzle_nas.architecture import Architecture, GatedFFN
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.training.refitting import refit

CHANGED = 1
RIDGE_TOKENS = 100.0


@pytest.fixture(scope="module")
def models(tiny_run):
    """The parent, a child with one narrower FFN, the same refitted, and the tokens of that."""
    run = RunFolder(tiny_run)
    parent, shape = load_parent(run)
    tokens = load_tokens(run, "calibration")
    architecture = Architecture.of_parent(shape).replaced(CHANGED, GatedFFN(96))
    before, after = (assemble(run, parent, architecture) for _ in range(2))
    refit(parent, after, tokens, RIDGE_TOKENS)
    return parent, before, after, tokens


def seen(model, tokens, module):
    """What a module receives, and the residual stream before and after its layer, each [N, .]."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda _, x, y: found.update(x=x[0], y=y)),
        model.model.layers[CHANGED].register_forward_hook(lambda _, x, y: found.update(out=y)),
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: value.flatten(0, 1).double() for name, value in found.items()}


def test_the_first_change_is_solved_as_torch_solves_it(models):
    parent, before, after, tokens = models
    now = before.model.layers[CHANGED].mlp.down_proj
    mine = seen(before, tokens, now)
    goal = seen(parent, tokens, parent.model.layers[CHANGED].mlp.down_proj)["out"]
    weight = goal.norm(dim=-1, keepdim=True) ** -1
    x, error = mine["x"] * weight, (goal - mine["out"]) * weight
    damping = RIDGE_TOKENS / tokens.numel() * (x**2).sum(0).mean()
    rows = torch.cat([x, damping.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([error, torch.zeros(x.shape[1], error.shape[1], dtype=x.dtype)])
    change = torch.linalg.lstsq(rows, wanted).solution.T
    found = after.model.layers[CHANGED].mlp.down_proj.weight.double() - now.weight.double()
    assert (found - change).norm() < 1e-3 * change.norm()


def test_below_the_first_change_nothing_changes_and_the_parent_never_does(models, tiny_run):
    parent, before, after, _ = models
    again, _ = load_parent(RunFolder(tiny_run))
    for name, weight in again.state_dict().items():
        assert torch.equal(parent.state_dict()[name], weight)
    changed = {n for n, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[n])}
    above = range(CHANGED + 1, len(parent.model.layers))
    assert changed == {f"model.layers.{CHANGED}.mlp.down_proj.weight"} | {
        f"model.layers.{layer}.{name}.weight" for layer in above for name in ("self_attn.o_proj", "mlp.down_proj")
    }
