"""The closed-form correction, against the least-squares problem solved by torch."""

import copy
import math

import pytest
import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import FAMILIES, Anatomy, architecture_of, load_parent
from puzzle_nas.library import assemble
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.specs import GatedFFN
from puzzle_nas.training import refitting
from puzzle_nas.training.refitting import RIDGE_TOKENS, RefitKL, refit, refit_if_better
from tests.families.parents import PARENTS, config_of, random_parent

CHANGED = 1


@pytest.fixture(scope="module")
def models(tiny_run):
    """The parent, a child with one narrower FFN, the same refitted, and the tokens of that."""
    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    tokens = load_tokens(run, "calibration")
    architecture = architecture_of(parent.config).replaced(CHANGED, GatedFFN(96))
    before, after = (assemble(run, parent, architecture) for _ in range(2))
    refit(parent, after, tokens)
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
    again = load_parent(open_run(RunFolder(tiny_run)), RunFolder(tiny_run))
    for name, weight in again.state_dict().items():
        assert torch.equal(parent.state_dict()[name], weight)
    changed = {n for n, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[n])}
    above = range(CHANGED + 1, len(parent.model.layers))
    assert changed == {f"model.layers.{CHANGED}.mlp.down_proj.weight"} | {
        f"model.layers.{layer}.{name}.weight" for layer in above for name in ("self_attn.o_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(("ridge_tokens", "kept"), [(RIDGE_TOKENS, True), (1e-3, False)])
def test_the_better_one_is_kept_and_the_child_stays_as_it_is(ridge_tokens, kept, models, tiny_run, monkeypatch):
    monkeypatch.setattr(refitting, "RIDGE_TOKENS", ridge_tokens)
    parent, child, _, tokens = models
    weights = {name: weight.clone() for name, weight in child.state_dict().items()}
    reference = ParentReference(parent, load_tokens(RunFolder(tiny_run), "selection"))
    # Solved for three tokens alone it is worse than before.
    better, _, kl = refit_if_better(parent, child, reference, tokens if kept else tokens[:1, :3])
    assert all(torch.equal(weight, weights[name]) for name, weight in child.state_dict().items())
    assert kl.kept == kept == (better is not child) == (kl.after < kl.before)
    assert kl.best == min(kl.before, kl.after) == reference.compare(better).kl_nats


def test_what_is_not_finite_is_never_better():
    assert RefitKL(None, 0.1).kept and RefitKL(None, 0.1).best == 0.1
    assert not RefitKL(0.1, None).kept and RefitKL(0.1, None).best == 0.1
    assert not RefitKL(None, None).kept and math.isnan(RefitKL(None, None).best)


@pytest.mark.parametrize("name", [name for name in PARENTS if FAMILIES[name.split(",")[0]].places["ffn"].output_norm])
@torch.no_grad()
def test_channels_that_an_output_norm_lets_little_of_through_are_not_blown_up(name):
    """What they lack below cannot be made up there: much more of it would make all other channels smaller."""
    tokens = torch.randint(3, 199, (32, 48), generator=torch.Generator().manual_seed(1))

    def refitted(gain):
        parent = random_parent(config_of(name))
        for subblock in Anatomy(parent).subblocks(1).values():
            # Gemma's gain is 1 more.
            getattr(subblock.layer, subblock.place.output_norm).weight[::4] = gain - name.startswith("gemma")
        child = copy.deepcopy(parent)
        matrix = Anatomy(child).subblocks(0)["ffn"].last.weight
        matrix += matrix.std() * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
        before = stream_distance(parent, child, tokens)
        refit(parent, child, tokens)
        return stream_distance(parent, child, tokens) / before

    assert refitted(0.02) < 1.1 * refitted(1e-4) < 0.8


def stream_distance(parent, child, tokens):
    """Relative squared error of what the last layer hands on."""
    theirs, mine = (list(Anatomy(m).states(tokens, Anatomy(m).inputs(tokens.shape[1])))[-2] for m in (parent, child))
    return ((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().item()
