"""Every parent x every variant that its layers offer, in every kind of layer x everything that is done with it.

Nothing is listed here: families come from their registry (`tests/families/parents.py` has parents of each), variants
from what the parent's own specs offer, formats from the exporters' registry.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.cost_fit import Part
from puzzle_nas.errors import ExportError, RecipeError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import Anatomy, architecture_of, build, child_config
from puzzle_nas.families.anatomy import check_adapter
from puzzle_nas.families.loading import stream_model
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.formats.stored import FILE, put, read_matrices, write_matrices
from puzzle_nas.library import assemble, variant_subblock, write_variant
from puzzle_nas.machine import Machine
from puzzle_nas.planning.shapes import part_weights
from puzzle_nas.recipe import BLDSettings, SearchSpaceSettings
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.search_space import build_search_space
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import Linear, WindowAttention
from puzzle_nas.subblocks import Context, Origin, add_observations, made_subblock, observed, run_with, variant_of
from puzzle_nas.subblocks.linear import PAPERS_PRODUCTS
from puzzle_nas.subblocks.statistics import inverse_norm
from puzzle_nas.training.activations import LayerActivations
from puzzle_nas.training.block_steps import BlockTask, Job, Trainee
from puzzle_nas.training.refitting import refit, rounded
from tests.families.parents import PARENTS, SIZES, config_of, parent_of

WINDOW = 3
ASKED = SearchSpaceSettings(windows=[WINDOW], width_fractions=[0.5], expert_counts=[0.5])
LENGTH = 13
"""Longer than every window."""
TOKENS_BT = torch.randint(3, SIZES["vocab_size"], (16, LENGTH), generator=torch.Generator().manual_seed(1))
PROMPTS_BT = TOKENS_BT[:2]
RIDGE = 1e-6
MACHINE = Machine(torch.device("cpu"), torch.float32)


def space_of(name):
    parent = architecture_of(config_of(name))
    return build_search_space(parent, ASKED, parent.slots, parent.slots, {})


CASES = [
    pytest.param(name, layer, spec, id=f"{name}: {layer}, {spec.id}")
    for name in PARENTS
    for layer in sorted(set(architecture_of(config_of(name)).groups))
    for spec in space_of(name).variants(layer)
]
OWN = [
    pytest.param(name, layer, spec, id=f"{name}: {layer}, {spec.id}")
    for name in PARENTS
    for layer in sorted(set(architecture_of(config_of(name)).groups))
    for spec in architecture_of(config_of(name)).layers[layer].values()
]
every_parent = pytest.mark.parametrize("name", PARENTS)
every_variant = pytest.mark.parametrize(("name", "layer", "spec"), CASES)


@functools.cache
def looked_at(name, layer):
    """What the sub-blocks of a layer compute on the tokens, by slot, and what is known of them for `variant_of`."""
    parent, parts = parent_of(name), Anatomy(parent_of(name))
    inputs = parts.inputs(LENGTH, (WINDOW,))
    subblocks = parts.subblocks(layer)
    states = [parts.embed(TOKENS_BT), *parts.states(TOKENS_BT, inputs)]
    activations, _ = observed(list(subblocks.values()), states[layer], inputs[layer])
    contexts = {slot: Context(Origin(parent, layer, slot), {}, RIDGE) for slot in subblocks}
    for spec in space_of(name).variants(layer):
        context = contexts[spec.slot]
        wanted = variant_of(spec).observations(spec, context.origin)
        new = {key: observe for key, observe in wanted.items() if key not in context.statistics}
        add_observations(context.statistics, new, activations[spec.slot])
    return activations, contexts


def error_of(name, layer, spec, weights):
    """Squared error of the mixer's output over all tokens, each by what it counts in least squares."""
    activations = looked_at(name, layer)[0][spec.slot]
    variant = made_subblock(parent_of(name), layer, spec, weights)
    mixed = variant.mixed(activations.read_BTD, activations.inputs)
    error = activations.mixed_ND.view(*activations.read_BTD.shape) - mixed
    return (error.flatten(0, 1).square().sum(-1) * inverse_norm(activations.mixed_ND)).sum().item()


@functools.cache
def made(name, layer, spec):
    """The weights of a variant: the best of its closed-form initialisations."""
    candidates = variant_of(spec).least_squares(spec, looked_at(name, layer)[1][spec.slot])
    return min(candidates.values(), key=lambda weights: error_of(name, layer, spec, weights))


@functools.cache
def walk_at(name, layer):
    walk = ReplacementWalk(parent_of(name), TOKENS_BT, 5 * LENGTH, windows=(WINDOW,))
    walk.climb_to(layer)
    return walk


def child_in(folder, name, layer, spec):
    """(run folder with the variant in its library, parent in which it replaces the parent's own)."""
    run, parent = RunFolder(folder / "run"), parent_of(name)
    write_variant(run.variant(layer, spec.id), [spec], made(name, layer, spec), {})
    return run, assemble(run, parent, architecture_of(parent.config).replaced(layer, spec))


def logits_of(model, tokens_BT=TOKENS_BT):
    return model(tokens_BT, use_cache=False).logits


def assert_generates_alike(model):
    """With cache, without, and with padding on the left: the same tokens."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(PROMPTS_BT, **settings)
    assert torch.equal(cached, model.generate(PROMPTS_BT, use_cache=False, **settings))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), PROMPTS_BT], dim=1)
    mask = (padded != 0).long()
    assert torch.equal(cached, model.generate(padded, attention_mask=mask, **settings)[:, 4:])
    return cached


@every_parent
@torch.no_grad()
def test_a_child_of_parent_variants_is_the_parent(name):
    parent = parent_of(name)
    architecture = architecture_of(parent.config)
    check_adapter(parent, range(len(architecture.layers)))
    child = build(child_config(parent.config, architecture), parent.state_dict())
    assert architecture_of(child.config) == architecture
    mask = torch.ones_like(TOKENS_BT)
    mask[0, :7] = 0
    torch.testing.assert_close(logits_of(child), logits_of(parent), rtol=0, atol=1e-5)
    masked = [model(TOKENS_BT, attention_mask=mask, use_cache=False).logits[:, 7:] for model in (child, parent)]
    torch.testing.assert_close(*masked, rtol=0, atol=1e-5)
    assert torch.equal(assert_generates_alike(child), assert_generates_alike(parent))


@every_parent
@torch.no_grad()
def test_a_streamed_parent_is_the_parent(name, tmp_path):
    parent = parent_of(name)
    parent.save_pretrained(tmp_path)
    parts = Anatomy(stream_model(tmp_path, MACHINE))
    check_adapter(parts.model, range(len(parts.layers)))
    *_, final = parts.states(TOKENS_BT, parts.inputs(LENGTH))
    logits = parts.head.shaped_(parts.head.matrix(final))
    torch.testing.assert_close(logits, logits_of(parent), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "layer", "spec"), OWN)
def test_the_parents_own_costs_nothing(name, layer, spec, tmp_path):
    parent = parent_of(name)
    own = variant_subblock(RunFolder(tmp_path), parent, layer, spec)
    (score,) = walk_at(name, layer).try_variants([{spec.slot: own}])
    assert score.kl_nats.abs().max() < 1e-5
    trainee, task, batch = in_training(name, layer, spec, own.layer.state_dict(), tmp_path)
    assert task.loss(trainee, batch).item() < 1e-10


def in_training(name, layer, spec, weights, folder):
    """(trainee, task, batch) of BLD."""
    activations = LayerActivations(parent_of(name), TOKENS_BT, folder, (WINDOW,))
    activations.climb_to(layer)
    task = BlockTask(activations, autocast=False)
    job = Job((spec,), folder / "unused", lambda: weights, {})
    trainee = Trainee(job, weights, parent_of(name), layer, BLDSettings(learning_rate=1e-3), 4)
    return trainee, task, task.fetch(torch.arange(len(TOKENS_BT)))


@every_variant
@torch.no_grad()
def test_least_squares_is_no_worse_than_the_papers_start(name, layer, spec):
    context = looked_at(name, layer)[1][spec.slot]
    if isinstance(spec, Linear) and spec.slot not in PAPERS_PRODUCTS:
        with pytest.raises(RecipeError, match=r"set library\.initialisation to least_squares"):
            variant_of(spec).paper(spec, context)
        return
    paper = variant_of(spec).paper(spec, context)
    assert error_of(name, layer, spec, made(name, layer, spec)) <= error_of(name, layer, spec, paper) * (1 + 1e-5)


@every_variant
def test_block_distillation_measures_the_block_and_improves_it(name, layer, spec, tmp_path):
    parts = Anatomy(parent_of(name))
    weights = made(name, layer, spec)
    trainee, task, batch = in_training(name, layer, spec, weights, tmp_path)
    variant = made_subblock(parts.model, layer, spec, weights)
    inputs = parts.inputs(LENGTH, (WINDOW,))[layer]
    output = run_with(list(parts.subblocks(layer).values()), {spec.slot: variant}, batch.x, inputs)
    parents = parts.layers[layer](batch.x, **inputs.layer)
    relative = (output - parents).square().sum(-1) / parents.square().sum(-1)
    loss = task.loss(trainee, batch)
    torch.testing.assert_close(loss, relative.mean(), rtol=1e-4, atol=1e-8)
    if weights:
        later = []
        for _ in range(4):
            task.update(trainee, batch, 1e-5)
            later.append(task.loss(trainee, batch))
        # A router that sends a token elsewhere makes the loss of a small mixture jump.
        assert min(later) < loss


@every_variant
@torch.no_grad()
def test_the_score_is_what_the_assembled_child_loses(name, layer, spec, tmp_path):
    run, child = child_in(tmp_path, name, layer, spec)
    (score,) = walk_at(name, layer).try_variants(
        [{spec.slot: variant_subblock(run, parent_of(name), layer, spec)}],
    )
    theirs, ours = (logits_of(model).log_softmax(-1) for model in (parent_of(name), child))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert kl.isfinite().all() and kl.max() > 1e-4
    torch.testing.assert_close(score.kl_nats, kl, rtol=1e-3, atol=1e-4)
    if isinstance(spec, WindowAttention):
        # The first token that cannot see all before it.
        assert kl[:, :WINDOW].max() < 1e-5 < kl[:, WINDOW].max()


@every_variant
@torch.no_grad()
def test_a_child_generates_alike_and_is_the_same_when_loaded(name, layer, spec, tmp_path):
    _, child = child_in(tmp_path, name, layer, spec)
    generated = assert_generates_alike(child)
    EXPORTERS["transformers"].write(Child(child, None), tmp_path, "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(child), rtol=0, atol=1e-5)
    assert architecture_of(loaded.config) == architecture_of(child.config)
    assert torch.equal(assert_generates_alike(loaded), generated)


@every_variant
@torch.no_grad()
def test_refitting_brings_a_child_nearer(name, layer, spec, tmp_path):
    parent = parent_of(name)
    _, child = child_in(tmp_path, name, layer, spec)
    before = distance(parent, child)
    refit(parent, child, TOKENS_BT)
    order = [(index, slot) for index, slot, _ in architecture_of(child.config)]
    behind = order[order.index((layer, spec.slot)) :]
    if any(Anatomy(child).subblocks(index)[slot].last is not None for index, slot in behind):
        assert distance(parent, child) < before
    else:
        assert distance(parent, child) == before


def distance(parent, child):
    """Relative squared error of what the last layer hands on."""
    (*_, theirs, _), (*_, ours, _) = (
        Anatomy(model).states(TOKENS_BT, Anatomy(model).inputs(LENGTH)) for model in (parent, child)
    )
    return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().item()


@every_variant
@torch.no_grad()
def test_formats_hold_a_child_or_refuse_it_by_name(name, layer, spec, tmp_path):
    _, model = child_in(tmp_path, name, layer, spec)
    child = Child(model, None)
    for exporter in EXPORTERS.values():
        kinds = {type(spec) for _, _, spec in child.architecture}
        is_held = child.family in exporter.families and kinds <= set(exporter.writers)
        is_held = is_held and child.family not in SERVERS[exporter.server].own_layers
        try:
            exporter.refuse(child)
        except ExportError as error:
            named = [spec.id, child.family] if not is_held else [*exporter.family_problems(child), "first layer"]
            assert exporter.name in str(error) and any(reason in str(error) for reason in named)
        else:
            assert is_held


@pytest.mark.parametrize(("name", "layer", "spec"), OWN)
@torch.no_grad()
def test_the_parents_own_in_a_format_is_what_is_stored_and_counted(name, layer, spec, tmp_path):
    """Every linear map and all experts, no router; int8 holds rows of every width."""
    parent, stored = parent_of(name), spec.stored("int8")
    child = build(
        child_config(parent.config, architecture_of(parent.config).replaced(layer, stored)), parent.state_dict()
    )
    matrices = rounded(parent, child, TOKENS_BT, {})
    prefix = f"{Anatomy(parent).layer_prefix}{layer}."
    assert matrices.keys() == {prefix + part for part in Anatomy(parent).subblocks(layer)[spec.slot].matrices}
    assert Child(child, None).forms == dict.fromkeys(matrices, "int8")
    changed = {n for n, w in child.state_dict().items() if not torch.equal(w, parent.state_dict()[n])}
    assert changed == matrices.keys() and not any("router" in n or n.endswith("mlp.gate.weight") for n in changed)
    write_matrices(matrices, tmp_path / FILE)
    loaded = build(child.config, parent.state_dict())
    put(loaded, read_matrices(tmp_path / FILE))
    assert torch.equal(logits_of(loaded), logits_of(child))
    counted = part_weights(parent, Part(layer, stored)).values()
    held = sum(tensor.nbytes for matrix in matrices.values() for tensor in matrix.parts.values())
    assert held == sum(layout_of("int8").bytes_of(*weight.shape) for weight in counted if weight.ndim > 1)
    mine = sum(w.numel() for n, w in child.named_parameters() if n in matrices)
    assert mine == sum(weight.numel() for weight in counted if weight.ndim > 1)
