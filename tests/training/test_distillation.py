"""GKD in less memory, without the parent, and through trouble: against GKD as it is without any of that."""

import json
import math
import shutil

import pytest
import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.errors import RecipeError
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.library import assemble
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.specs import GatedFFN
from puzzle_nas.training import distillation
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent, StoredParent
from tests.conftest import puzzle


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy whose GKD has not begun."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def training(run, parent=None, removed=None, every=2, **gkd):
    settings = json.loads(open_run(run).model_dump_json())
    settings["gkd"] |= {"tokens": 2048, "learning_rate": 1e-3, **gkd}
    recipe = parse_recipe(json.dumps(settings))
    whole = load_parent(open_run(run), run)
    # Every FFN narrowed, a fixed child: what the search found depends on measured times.
    architecture = architecture_of(whole.config)
    for layer in range(whole.config.num_hidden_layers):
        architecture = architecture.replaced(layer, GatedFFN(96))
    if removed is not None:
        architecture = architecture.without([removed])
    job = Training(recipe, run, parent or LiveParent(whole), assemble(run, whole, architecture))
    job.every = every
    return job


def weights(training):
    return {name: p.detach().clone() for name, p in training.child.named_parameters()}


def gradients(training):
    """Of the first step."""
    found = {}

    def keep(rate, loss):
        found.update({name: p.grad.clone() for name, p in training.optimiser.parameters.items()})
        return torch.tensor(True)

    training.optimiser.update = keep
    assert training.step(0)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_tokens": 64},
        {"gradient_checkpointing": True},
        {"micro_batch_tokens": 1, "losses": {"kl": 1, "lm": 0.5}},
    ],
    ids=str,
)
def test_less_memory_and_the_same_gradients(run, settings):
    plain = {key: value for key, value in settings.items() if key == "losses"}
    expected, found = gradients(training(run, **plain)), gradients(training(run, **settings))
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_runs_blocks_twice(run):
    seen = []
    job = training(run, gradient_checkpointing=True)
    job.child.model.layers[1].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    assert job.step(0) and len(seen) == 2


def test_compiled_layers_give_the_same_gradients(run):
    stats = torch._dynamo.utils.counters["stats"]
    plain, before = gradients(training(run)), stats["unique_graphs"]
    compiled = gradients(training(run, compile=True))
    assert stats["unique_graphs"] > before
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_layer_in_which_nothing_runs_keeps_none_of_the_others_from_being_compiled(run):
    stats = torch._dynamo.utils.counters["stats"]
    job = training(run, compile=True, removed=2)
    assert job.step(0)
    before = stats["unique_graphs"]
    assert job.step(1)
    assert stats["unique_graphs"] == before


def test_without_a_compiler_compiling_is_refused(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler"):
        training(run, compile=True)


def stored(run, k, load=None):
    train, selection = load_tokens(run, "train"), load_tokens(run, "selection")
    folder = run.scratch("distill_child") / "parent"
    blocks = torch.arange(3, len(train))
    load = load or (lambda: load_parent(open_run(run), run))
    return StoredParent(folder, load, train, blocks, selection, k, torch.device("cpu"))


def test_the_stored_parent_stands_for_the_parent_and_is_written_once(run):
    first = stored(run, 1023)
    victim = first.paths[3]
    victim.unlink()
    before = first.paths[2].stat().st_mtime_ns
    stored(run, 1023)
    assert victim.exists() and first.paths[2].stat().st_mtime_ns == before

    def load():
        raise AssertionError("the parent was loaded")

    live, from_disk = training(run, losses={"kl": 1.0}), training(run, stored(run, 1023, load), losses={"kl": 1.0})
    for kind in (live, from_disk):
        kind.train()
        shutil.rmtree(run.scratch("distill_child"), ignore_errors=True)
        stored(run, 1023)
    assert from_disk.losses == pytest.approx(live.losses, rel=1e-3)
    ours, theirs = ([p["selection_kl_nats"] for p in t.curve] for t in (from_disk, live))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_stored_parent_through_the_command_line(run):
    puzzle("distill-child", run, "gkd.parent_top_k=16", "gkd.losses={kl: 1}", "gkd.tokens=2048")
    assert len(json.loads((run / "gkd.json").read_text())["curve"]) == 2
    assert not run.scratch("distill_child").exists()
    refused = puzzle("distill-child", run, "gkd.parent_top_k=16", "gkd.losses.cosine=1", check=False)
    assert refused.returncode == 2 and "set gkd.losses to {kl: 1}" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("also_train", [[], ["embeddings"]], ids=str)
def test_resumed_it_ends_with_the_same_bits(run, also_train, monkeypatch):
    settings = {"learning_rate": 3e-4, "also_train": also_train}
    whole = training(run, **settings)
    whole.train()
    assert whole.best["step"]
    shutil.rmtree(run.scratch("distill_child"))
    first = training(run, **settings)
    whole_step = first.step
    monkeypatch.setattr(first, "step", lambda step: 1 / 0 if step == 5 else whole_step(step))
    with pytest.raises(ZeroDivisionError):
        first.train()
    second = training(run, **settings)
    second.train()
    assert second.curve == whole.curve and second.losses == whole.losses
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(second).items())


def spoil(monkeypatch, bad):
    """Losses of the steps that `bad` picks, by count of losses so far, are NaN."""
    count, true_loss = [0], distillation.gkd_loss

    def loss(*arguments):
        count[0] += 1
        return true_loss(*arguments) * (math.nan if bad(count[0] - 1) else 1.0)

    monkeypatch.setattr(distillation, "gkd_loss", loss)
    return count


def test_a_step_with_nan_is_skipped_and_named(run, monkeypatch, capsys):
    spoil(monkeypatch, lambda number: number == 3)
    job = training(run)
    job.train()
    assert len(job.losses) == len(job.batches) - 1 and job.setbacks == 0
    assert all(torch.isfinite(weight).all() for weight in weights(job).values())
    assert "1 of the steps up to 4 had no finite gradient" in " ".join(capsys.readouterr().out.split())
    assert job.best["selection_kl_nats"] < job.curve[0]["selection_kl_nats"]


def test_nan_that_stays_sets_it_back_to_the_last_checkpoint(run, monkeypatch, capsys):
    count = spoil(monkeypatch, lambda number: 5 <= number < 9)
    job = training(run, every=5, tokens=4096)
    job.train()
    assert job.setbacks == 1 and count[0] == len(job.batches) + 4
    assert len(job.losses) == len(job.batches)
    assert "from step 5 with half the learning rate" in " ".join(capsys.readouterr().out.split())


def test_weights_that_explode_are_taken_back(run, monkeypatch, capsys):
    job = training(run, every=4, tokens=4096)
    whole_step = job.step

    def step(number):
        done = whole_step(number)
        if number == 6 and job.setbacks == 0:
            for parameter in job.optimiser.parameters.values():
                parameter.data.mul_(50)
        return done

    monkeypatch.setattr(job, "step", step)
    job.train()
    out = " ".join(capsys.readouterr().out.split())
    assert "KL has exploded at step 8; it goes on from step 4" in out
    assert [point["step"] for point in job.curve] == [0, 4, 8, 12, 16] and job.setbacks == 1
    assert job.best["step"] == 16


def test_what_never_heals_stops_and_keeps_the_best(run, monkeypatch, capsys):
    spoil(monkeypatch, lambda number: number >= 4)
    job = training(run, learning_rate=3e-4)
    job.train()
    assert 0 < job.best["step"] <= 4 and job.setbacks == distillation.MOST_SETBACKS + 1
    assert "it stops here" in " ".join(capsys.readouterr().out.split())
    assert job.reference.compare(job.finish()).kl_nats == pytest.approx(job.best["selection_kl_nats"], rel=1e-5)
