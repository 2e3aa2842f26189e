"""Scores around a child, against models assembled and measured by other means."""

import json

import pytest
import torch

from puzzle_nas.architecture import Architecture, GatedFFN, GroupedAttention, NoOpFFN
from puzzle_nas.architecture_search import ArchitectureSearch
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import load_parent
from puzzle_nas.library import assemble
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe import parse_recipe
from puzzle_nas.stages import score_blocks
from puzzle_nas.training.refinement import Refinement, Trials


@pytest.fixture(scope="module")
def run(tiny_run):
    return RunFolder(tiny_run)


@pytest.fixture(scope="module")
def parent(run):
    return load_parent(run)[0]


@pytest.fixture(scope="module")
def found(run):
    return ArchitectureSearch.load(open_run(run), run)


@pytest.fixture(scope="module")
def trials(run, parent):
    return Trials(run, parent, load_tokens(run, "scoring"), load_tokens(run, "selection"), 256)


def torch_kl(parent, child, tokens):
    with torch.no_grad():
        p, q = (model(tokens).logits.double().log_softmax(-1).flatten(0, 1) for model in (parent, child))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()


def test_around_the_parent_they_are_the_replace_1_block_scores(found, trials):
    around = trials.scores_around(found.parent, found.scores)
    assert around == pytest.approx(found.scores, rel=1e-4, abs=1e-7)


def test_around_a_child_they_are_differences_of_real_kl(run, parent, found, trials):
    child = found.parent.replaced(1, NoOpFFN()).replaced(3, GroupedAttention(1))
    around = trials.scores_around(child, found.scores)
    tokens = load_tokens(run, "scoring")
    present = torch_kl(parent, assemble(run, parent, child), tokens)
    for layer, spec in ((1, GatedFFN(341)), (1, GatedFFN(96)), (3, GatedFFN(96)), (3, GroupedAttention(2))):
        changed = torch_kl(parent, assemble(run, parent, child.replaced(layer, spec)), tokens)
        assert around[layer, (spec,)] == pytest.approx(changed - present, rel=1e-3, abs=1e-6)
    assert around[1, (NoOpFFN(),)] == around[3, (GroupedAttention(1),)] == 0


def test_refinement_keeps_limits_and_never_ends_worse_than_the_search(found, trials):
    limits = {"parameters": 0.8 * found.costs.parameters(found.parent)}
    recipe = parse_recipe("{parent: p, data: {sources: [{source: s}]}, search: {verify: 3, refine_rounds: 2}}")
    refinement = Refinement((found,), recipe.search, trials)
    best = refinement.best(limits)
    first = found.architecture(found.solve(limits, 1e-4, 60)[0])
    assert trials.kl_nats(best) == min(row["selection_kl_nats"] for row in refinement.tried) <= trials.kl_nats(first)
    assert [row["found_by"] for row in refinement.tried[:4]] == ["search"] * 3 + ["refinement"]
    assert found.costs.parameters(best) <= limits["parameters"]
    tighter = {"parameters": 0.7 * found.costs.parameters(found.parent)}
    assert found.costs.parameters(refinement.best(tighter)) <= tighter["parameters"]


def test_candidates_come_from_sums_of_either_loss(run, found, trials):
    searches = found.by_either_loss(open_run(run), run)
    for choice, score in found.scores.items():
        file = run.score(choice[0], choice[1][0].id)
        lm = json.loads(file.read_text())["lm_loss_increase_nats"]["mean"] if score else 0.0
        assert [s.scores[choice] for s in searches] == pytest.approx([score, lm, (score + lm) / 2])
    recipe = parse_recipe("{parent: p, data: {sources: [{source: s}]}, search: {verify: 5, min_different: 2}}")
    limits = {"speedup": 1.2}
    candidates = [
        search.architecture(solution)
        for search, count in zip(searches, (2, 2, 1), strict=True)
        for solution in search.solve(limits, 1e-4, 60, count, 2)
    ]
    refinement = Refinement(searches, recipe.search, trials)
    best = refinement.best(limits)
    assert [row["score_sum"] for row in refinement.tried] == [
        found.score_of(c) for number, c in enumerate(candidates) if c not in candidates[:number]
    ]
    assert trials.kl_nats(best) == min(map(trials.kl_nats, candidates))


def test_scores_by_block_are_of_both_sub_blocks_together(run, parent, tmp_path, found):
    """Scored by block: a block with one parent sub-block scores as that sub-block; a pair, as the real model."""
    import shutil

    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    settings = json.loads(open_run(run).model_dump_json())
    settings["scoring"]["unit"] = "block"
    recipe = parse_recipe(json.dumps(settings))
    score_blocks.run(recipe, copy)
    by_block = ArchitectureSearch.load(recipe, copy)
    for (layer, (attention, ffn)), score in by_block.scores.items():
        own = found.parent.layers[layer]
        if attention == own["attention"]:
            assert score == pytest.approx(found.scores[layer, (ffn,)], rel=1e-4, abs=1e-7)
    pair = (GroupedAttention(1), GatedFFN(96))
    child = Architecture.from_list(found.parent.to_list()).replaced(2, pair[0]).replaced(2, pair[1])
    real = torch_kl(parent, assemble(copy, parent, child), load_tokens(copy, "scoring"))
    assert by_block.scores[2, pair] == pytest.approx(real, rel=1e-4)
    best = by_block.architecture(by_block.solve({"speedup": 1.1}, 1e-4, 60)[0])
    assert len(best.layers) == len(found.parent.layers) and by_block.score_of(best) > 0
