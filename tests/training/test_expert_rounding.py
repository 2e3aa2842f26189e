"""Experts rounded in closed form: exact in files, better than to nearest on other text, however little it was."""

import copy

import pytest
import torch
from transformers import AutoConfig

from puzzle_nas.data.sources import documents
from puzzle_nas.families import Anatomy, architecture_of, build, child_config
from puzzle_nas.formats.rounding import damped
from puzzle_nas.formats.stored import Matrix, parameter_of, read_matrices, write_matrices
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.scoring.comparison import ParentReference
from puzzle_nas.subblocks.experts import route, router_name
from puzzle_nas.training import expert_rounding
from puzzle_nas.training.expert_rounding import round_experts
from puzzle_nas.training.refitting import rounded, rounded_alone
from tests.conftest import glassllm_as_llama
from tests.families.parents import PARENTS, SIZES, random_parent
from tests.mixtures import upcycled

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_next"]
WIDTH = {"qwen3_moe": "moe_intermediate_size", "qwen3_next": "moe_intermediate_size"}
LAYER = 1
LENGTH = 64


@pytest.fixture(scope="module", params=FAMILIES)
def parent(request):
    """Whose matrices hold blocks of 32."""
    wide = {"hidden_size": 64, "shared_expert_intermediate_size": 32, WIDTH.get(request.param, "intermediate_size"): 32}
    return random_parent(AutoConfig.for_model(request.param, **SIZES | PARENTS[request.param] | wide))


def read_by(parent, sequences, seed):
    """What the residual stream is below a layer's mixture and above it, each [B, T, D], and the layer's inputs."""
    tokens = torch.randint(3, SIZES["vocab_size"], (sequences, 16), generator=torch.Generator().manual_seed(seed))
    parts = Anatomy(parent)
    inputs = parts.inputs(tokens.shape[1])
    below, *_ = parts.states(tokens, inputs)
    mixer, experts = parts.subblocks(LAYER).values()
    below = below + mixer.added(below, inputs[LAYER])
    return below, below + experts.added(below, inputs[LAYER]), inputs[LAYER]


@torch.no_grad()
def test_weights_are_those_in_the_file_and_routers_stay(parent, tmp_path):
    below, above, inputs = read_by(parent, 16, seed=1)
    own = Anatomy(parent).subblocks(LAYER)["experts"]
    spec = architecture_of(parent.config).layers[LAYER]["experts"].stored("q4_0")
    weights, matrices = rounded_alone(parent, LAYER, spec, [below], [above], inputs)
    assert matrices.keys() == own.matrices.keys()
    assert {name.rpartition(".")[2] for name in matrices} >= {"gate_up_proj", "down_proj"}
    assert not any(f".{router_name(own.mixer)}." in name for name in matrices)
    write_matrices(matrices, tmp_path / "formats.safetensors")
    read = read_matrices(tmp_path / "formats.safetensors")
    for name, weight in weights.items():
        before = own.layer.get_parameter(name)
        assert weight.shape == before.shape and torch.equal(weight, before) == (name not in read)
        if name in read:
            assert torch.equal(weight, read[name].weight)
            # On the same scales they are what they are.
            assert torch.equal(read[name].of(weight).rounded.codes_OI, read[name].rounded.codes_OI)


@torch.no_grad()
def test_experts_give_on_other_tokens_what_they_gave_better_than_to_nearest(parent):
    below, above, inputs = read_by(parent, 64, seed=1)
    others, goal, _ = read_by(parent, 64, seed=2)
    own = Anatomy(parent).subblocks(LAYER)["experts"]

    def error(rounding):
        subblock = copy.deepcopy(own)
        rounding(subblock)
        assert router_of(subblock) == router_of(own)
        wrong = others + subblock.added(others, inputs) - goal
        return (wrong.square().sum(-1) / goal.square().sum(-1)).mean().item()

    def closed_form(subblock):
        read = subblock.read(below).flatten(0, 1)
        round_experts(subblock, "q4_0", read, above.flatten(0, 1).norm(dim=1) ** -2)

    assert 0 < error(closed_form) < 0.9 * error(to_nearest)


def to_nearest(subblock):
    for name, module in subblock.matrices.items():
        part = name.rpartition(".")[2]
        if part in ("gate_up_proj", "down_proj"):
            weight = getattr(module, part)
            setattr(module, part, parameter_of(Matrix.nearest("q4_0", module, weight), weight))


def router_of(subblock):
    router = getattr(subblock.mixer, router_name(subblock.mixer))
    return {name: weight.tolist() for name, weight in router.named_parameters()}


@pytest.fixture(scope="module")
def mixture():
    """(a mixture whose experts know text, tokens of calibration [S, T], others)."""
    dense, tokenizer = glassllm_as_llama()
    stream = documents(SourceSettings(source="python-stdlib"), 0)

    def text(sequences):
        tokens = []
        while len(tokens) < sequences * LENGTH:
            tokens += tokenizer(next(stream))["input_ids"]
        return torch.tensor(tokens[: sequences * LENGTH]).view(sequences, LENGTH)

    calibration, others = text(64), text(16)
    return upcycled(dense, calibration, 8, 2, 128, steps=0), calibration, others


@pytest.mark.parametrize(("sequences", "of_nearest", "of_alone"), [(1, 0.75, 0.8), (64, 0.3, 1.1)])
@torch.no_grad()
def test_however_few_tokens_an_expert_has(sequences, of_nearest, of_alone, mixture, monkeypatch):
    """KL with 16 and 1,024 tokens of 128 inputs, against rounding to nearest and error feedback for them alone."""
    parent, calibration, others = mixture
    reference = ParentReference(parent, others)
    architecture = architecture_of(parent.config)
    for layer, block in enumerate(architecture.layers):
        architecture = architecture.replaced(layer, block["experts"].stored("q4_0"))

    def kl(rounding):
        child = build(child_config(parent.config, architecture), parent.state_dict())
        rounding(child)
        return reference.compare(child).kl_nats

    def all_to_nearest(child):
        for layer in range(len(architecture.layers)):
            to_nearest(Anatomy(child).subblocks(layer)["experts"])

    def closed_form(child):
        rounded(parent, child, calibration[:sequences], {})

    nearest, ours = kl(all_to_nearest), kl(closed_form)
    monkeypatch.setattr(expert_rounding, "damped", lambda gram, _: damped(gram, 0))
    assert 0 < ours < min(of_nearest * nearest, of_alone * kl(closed_form))


@torch.no_grad()
def test_an_expert_without_tokens_is_rounded_all_the_same(mixture):
    parent, calibration, _ = mixture
    subblock = copy.deepcopy(Anatomy(parent).subblocks(0)["experts"])
    read = subblock.read(Anatomy(parent).embed(calibration[:1, :4])).flatten(0, 1)
    _, _, numbers = route(subblock.mixer, read)
    assert len(numbers.unique()) < 8
    matrices = round_experts(subblock, "q4_0", read, torch.ones(len(read)))
    assert all(matrix.weight.isfinite().all() for matrix in matrices.values())
