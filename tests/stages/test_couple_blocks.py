"""The two-step way on the tiny parent: decoupled, search, coupled on what it used, search again."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import puzzle_nas.modeling  # noqa: F401
from puzzle_nas.architecture import Architecture, choice_id
from puzzle_nas.artifacts import RunFolder, file_checksum
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.library import assemble, block_weights
from puzzle_nas.pipeline import open_run
from puzzle_nas.search_space import SearchSpace
from puzzle_nas.specs import GatedFFN, GroupedAttention, NoOp
from tests.conftest import puzzle
from tests.faults import COUPLED


@pytest.fixture(scope="module")
def two_steps(tiny_run, tmp_path_factory):
    """A copy of the finished run, gone on with coupled BLD to the assembled child; its cost table is pinned."""
    folder = tmp_path_factory.mktemp("coupled") / "run"
    shutil.copytree(tiny_run, folder)
    overrides = [f"bld.{name}={value}" for name, value in COUPLED.items()]
    pin = f"costs.file={tiny_run / 'costs/torch.json'}"
    recipe = tiny_run.parent / "tiny.yaml"
    out = puzzle("run", recipe, *overrides, pin, "--run-dir", folder, "--to", "assemble-child").stdout
    # All but the cost table, which has become a file, is of use as it is.
    assert out.count("already done") == 5 and "/13] couple-blocks" in out
    return RunFolder(folder)


@pytest.fixture(scope="module")
def parent(two_steps):
    return load_parent(open_run(two_steps), two_steps)


def pairs_of(run):
    """(layer, the specs' JSON, facts) of every trained pair."""
    for path in sorted((run / "library/coupled").glob("layer_*/*.json")):
        facts = json.loads(path.read_text())
        yield int(path.parent.name.removeprefix("layer_")), facts["specs"], facts


def block(attention, ffn):
    row = {"attention": attention, "ffn": ffn}
    return Architecture.from_list([row]).layers[0]


def test_pairs_are_those_of_what_solutions_use_and_learn_together(two_steps):
    listed = json.loads(two_steps.coupled_pairs.read_text())
    trained = [(layer, choice_id(tuple(block(*specs).values()))) for layer, specs, _ in pairs_of(two_steps)]
    assert sorted(trained) == sorted((i, pair) for i, ids in enumerate(listed["layers"]) for pair in ids)
    assert 2 <= len(listed["score_sums_of_solutions"]) <= 4
    facts = [facts for _, _, facts in pairs_of(two_steps)]
    assert all(f["held_out_loss_end"] <= f["held_out_loss_start"] or f["fell_back"] for f in facts)
    assert sum(f["held_out_loss_end"] < 0.99 * f["held_out_loss_start"] for f in facts) > len(facts) / 2


def test_a_pair_starts_from_the_decoupled_variants_and_trains_the_parents_half_too(two_steps, parent):
    own = architecture_of(parent.config).layers
    moved = 0
    for layer, specs, facts in pairs_of(two_steps):
        pair = tuple(block(*specs).values())
        before = block_weights(two_steps, parent, layer, pair)
        after = block_weights(two_steps, parent, layer, pair, "coupled")
        assert before.keys() == after.keys()
        if not facts["fell_back"]:
            # Norms only scale the columns of what reads them, and stay.
            assert all(torch.equal(before[name], after[name]) == ("layernorm" in name) for name in before)
            moved += any(spec == own[layer][spec.slot] for spec in pair)
    assert moved


def test_scores_of_pairs_are_what_a_model_with_that_block_measures(two_steps, parent):
    layer, specs, _ = max(pairs_of(two_steps), key=lambda row: row[2]["parameters"])
    blocks = list(architecture_of(parent.config).layers)
    blocks[layer] = block(*specs)
    child = assemble(two_steps, parent, Architecture(tuple(blocks)), "coupled")
    tokens = load_tokens(two_steps, "scoring")
    with torch.no_grad():
        p, q = (model(tokens).logits.double().log_softmax(-1).flatten(0, 1) for model in (parent, child))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    path = two_steps.score(layer, choice_id(tuple(blocks[layer].values())), "coupled")
    assert json.loads(path.read_text())["kl_nats"]["mean"] == pytest.approx(kl, rel=1e-4)


def test_the_second_search_knows_both_and_the_child_has_the_pairs_weights(two_steps, parent):
    found = ArchitectureSearch.load(open_run(two_steps), two_steps)
    first = ArchitectureSearch.load_with(found.costs, open_run(two_steps), two_steps, library="main")
    pairs = {(layer, tuple(block(*specs).values())) for layer, specs, _ in pairs_of(two_steps)}
    for (layer, specs), score in found.scores.items():
        alone = sum(first.scores[layer, (spec,)] for spec in specs)
        assert ((layer, specs) in pairs) or score == pytest.approx(alone, abs=1e-12)
    result = json.loads(two_steps.architecture().read_text())
    assert result["library"] == "coupled" and result["speedup_predicted"] >= 1.2
    child = AutoModelForCausalLM.from_pretrained(two_steps / "child", dtype=torch.float32).state_dict()
    coupled = 0
    for layer, specs in enumerate(Architecture.from_list(result["architecture"]).layers):
        path = two_steps.variant(layer, choice_id(tuple(specs.values())), "coupled")
        coupled += path.exists()
        for name, weight in safetensors.torch.load_file(path).items() if path.exists() else ():
            assert torch.equal(child[f"model.layers.{layer}.{name}"], weight)
    assert coupled


def test_without_it_nothing_is_paired_and_the_command_says_how_to_ask_for_it(tiny_run, tmp_path):
    before = {path: file_checksum(path) for path in tiny_run.rglob("*") if path.is_file()}
    result = puzzle("couple-blocks", tiny_run, check=False)
    assert result.returncode == 2 and "bld.coupled_tokens" in result.stderr
    assert {path: file_checksum(path) for path in tiny_run.rglob("*") if path.is_file()} == before
    assert not (tiny_run / "library/coupled").exists()


def test_a_pair_of_nothing_or_of_the_parent_is_not_trained():
    from puzzle_nas.stages.couple_blocks import _trains

    own = SearchSpace(({"attention": (GroupedAttention(2),), "ffn": (GatedFFN(341),)},))
    assert not _trains((0, (GroupedAttention(2), GatedFFN(341))), own)
    assert not _trains((0, (NoOp("attention"), NoOp("ffn"))), own)
    assert _trains((0, (GroupedAttention(2), NoOp("ffn"))), own)
    assert _trains((0, (NoOp("attention"), GatedFFN(96))), own)
