"""Scores around a child, against models assembled and measured by other means."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.refinement import Refinement, Trials
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.effort import Effort
from puzzle_nas.families import architecture_of, load_parent
from puzzle_nas.library import assemble
from puzzle_nas.pipeline import open_run
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.specs import GatedFFN, GroupedAttention, NoOp
from puzzle_nas.stages import score_blocks
from puzzle_nas.stages.search_architecture import TRIED_ON
from puzzle_nas.training import refitting
from puzzle_nas.training.refitting import refit

FOUND_BY = ("search", "removed run", "refinement")


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy: what is measured of candidates is written."""
    folder = tmp_path_factory.mktemp("refinement") / "run"
    shutil.copytree(tiny_run, folder)
    return RunFolder(folder)


@pytest.fixture(scope="module")
def parent(run):
    return load_parent(open_run(run), run)


@pytest.fixture(scope="module")
def found(run):
    return ArchitectureSearch.load(open_run(run), run)


@pytest.fixture(scope="module")
def splits(run):
    return {split: load_tokens(run, split) for split in TRIED_ON}


@pytest.fixture(scope="module")
def trials(run, parent, splits):
    return Trials(run, parent, open_run(run), splits)


def torch_kl(parent, child, tokens):
    with torch.no_grad():
        p, q = (model(tokens).logits.double().log_softmax(-1).flatten(0, 1) for model in (parent, child))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()


def test_around_the_parent_they_are_the_replace_1_block_scores(found, trials):
    around = trials.scores_around(found.parent, found.scores)
    assert around == pytest.approx(found.scores, rel=1e-4, abs=1e-7)


def test_around_a_child_they_are_differences_of_real_kl(run, parent, found, trials):
    child = found.parent.replaced(1, NoOp("ffn")).replaced(3, GroupedAttention(1))
    around = trials.scores_around(child, found.scores)
    tokens = load_tokens(run, "scoring")
    present = torch_kl(parent, assemble(run, parent, child), tokens)
    for layer, spec in ((1, GatedFFN(341)), (1, GatedFFN(96)), (3, GatedFFN(96)), (3, GroupedAttention(2))):
        changed = torch_kl(parent, assemble(run, parent, child.replaced(layer, spec)), tokens)
        assert around[layer, (spec,)] == pytest.approx(changed - present, rel=1e-3, abs=1e-6)
    assert around[1, (NoOp("ffn"),)] == around[3, (GroupedAttention(1),)] == 0


def test_a_child_is_measured_refitted_where_that_helps(run, parent, splits, trials, monkeypatch):
    removed = architecture_of(parent.config).replaced(1, NoOp("ffn"))
    child = assemble(run, parent, removed)
    assembled = torch_kl(parent, child, splits["selection"])
    refit(parent, child, splits["calibration"])
    assert trials.kl_nats(removed) == pytest.approx(torch_kl(parent, child, splits["selection"]), rel=1e-3)
    assert trials.kl_nats(removed) < 0.9 * assembled
    off = open_run(run).model_copy(update={"refit": False})
    assert Trials(run, parent, off, splits).kl_nats(removed) == pytest.approx(assembled, rel=1e-3)
    # Solved for three tokens alone it is worse than before, which then counts.
    monkeypatch.setattr(refitting, "RIDGE_TOKENS", 0.001)
    few = {**splits, "calibration": splits["calibration"][:1, :3]}
    assert Trials(run, parent, open_run(run), few).kl_nats(removed) == pytest.approx(assembled, rel=1e-3)


def test_candidates_lack_the_run_of_layers_that_harms_least(run, parent, found, splits, trials):
    # Nothing less than two of the four layers is enough.
    limits = {"parameters": found.costs.parameters(found.parent.without([0, 1]))}
    refinement = Refinement((found,), Effort(removed_runs=5), trials)
    refinement.best(limits)
    assert [row["found_by"] for row in refinement.tried] == ["search", "removed run", "removed run"]
    pairs = [found.parent.without([first, first + 1]) for first in range(3)]
    kl = [torch_kl(parent, assemble(run, parent, pair), splits["scoring"]) for pair in pairs]
    pair = pairs[kl.index(min(kl))]
    half = [found.parent.without([layer]) for layer in range(4) if pair.layers[layer] != found.parent.layers[layer]]
    kl = [torch_kl(parent, assemble(run, parent, one), splits["scoring"]) for one in half]
    gone = next(i for i in range(4) if half[kl.index(min(kl))].layers[i] != found.parent.layers[i])
    second = found.architecture(found.without([gone]).solve(limits, 1e-4, 60)[0])
    assert second.layers[gone] == pair.layers[gone] and found.meets(limits, second)
    assert [row["selection_kl_nats"] for row in refinement.tried[1:]] == [trials.kl_nats(a) for a in (pair, second)]
    assert found.removable_layers == {0, 1, 2, 3}
    kept = {c: s for c, s in found.scores.items() if c != (2, (NoOp("ffn"),))}
    assert replace(found, scores=kept).removable_layers == {0, 1, 3}


def test_refinement_keeps_limits_and_never_ends_worse_than_the_search(found, trials):
    limits = {"parameters": 0.8 * found.costs.parameters(found.parent)}
    refinement = Refinement((found,), Effort(by_sums=3, refine_rounds=2), trials)
    best = refinement.best(limits)
    first = found.architecture(found.solve(limits, 1e-4, 60)[0])
    assert trials.kl_nats(best) == min(row["selection_kl_nats"] for row in refinement.tried) <= trials.kl_nats(first)
    assert [row["found_by"] for row in refinement.tried[:4]] == ["search"] * 3 + ["refinement"]
    assert found.costs.parameters(best) <= limits["parameters"]
    tighter = {"parameters": 0.7 * found.costs.parameters(found.parent)}
    assert found.costs.parameters(refinement.best(tighter)) <= tighter["parameters"]


def test_scores_are_taken_around_the_best_of_each_kind(run, parent, found, splits):
    around = []

    class Seen(Trials):
        def scores_around(self, architecture, choices, on_layer=lambda: None):
            around.append(architecture)
            return super().scores_around(architecture, choices, on_layer)

    trials = Seen(run, parent, open_run(run), splits)
    limits = {"parameters": found.costs.parameters(found.parent.without([0, 1]))}
    refinement = Refinement((found,), Effort(by_sums=2, removed_runs=2, refine_rounds=2), trials)
    best = refinement.best(limits)
    kl = {how: [r["selection_kl_nats"] for r in refinement.tried if r["found_by"] == how] for how in FOUND_BY}
    leaders = sorted([min(kl["search"]), *kl["removed run"]])
    assert [trials.kl_nats(a) for a in around] == leaders[:2]
    assert trials.kl_nats(best) == min(leaders[0], *kl["refinement"])


def test_no_child_is_measured_twice(run, parent, splits, found, monkeypatch):
    child = found.parent.replaced(2, NoOp("ffn"))
    trials = Trials(run, parent, open_run(run), splits)
    first = trials.kl_nats(child), trials.best_run([range(1), range(2, 3)]), trials.scores_around(child, found.scores)
    monkeypatch.setattr("puzzle_nas.choosing.refinement.assemble", lambda *_: pytest.fail("assembled again"))
    again = Trials(run, parent, open_run(run), splits)
    assert first == (
        again.kl_nats(child),
        again.best_run([range(1), range(2, 3)]),
        again.scores_around(child, found.scores),
    )


def test_candidates_come_from_sums_of_either_loss(run, found, trials, monkeypatch):
    monkeypatch.setattr("puzzle_nas.choosing.refinement.MIN_DIFFERENT", 2)
    searches = found.by_either_loss(open_run(run), run)
    for choice, score in found.scores.items():
        file = run.score(choice[0], choice[1][0].id)
        lm = json.loads(file.read_text())["lm_loss_increase_nats"]["mean"] if score else 0.0
        assert [s.scores[choice] for s in searches] == pytest.approx([score, lm, (score + lm) / 2])
    limits = {"speedup": 1.2}
    candidates = [
        search.architecture(solution)
        for search, count in zip(searches, (2, 2, 1), strict=True)
        for solution in search.solve(limits, 1e-4, 60, count, 2)
    ]
    refinement = Refinement(searches, Effort(by_sums=5), trials)
    best = refinement.best(limits)
    assert [row["score_sum"] for row in refinement.tried] == [
        found.score_of(c) for number, c in enumerate(candidates) if c not in candidates[:number]
    ]
    assert trials.kl_nats(best) == min(map(trials.kl_nats, candidates))


def test_scores_by_block_are_of_both_sub_blocks_together(run, parent, tmp_path, found):
    """Scored by block: a block with one parent sub-block scores as that sub-block; a pair, as the real model."""
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


@pytest.mark.parametrize(("most", "expected"), [(4, []), (3, [1]), (1, [3])])
def test_as_many_layers_go_as_are_enough_in_the_cheapest_format(found, most, expected, capsys):
    """A layer costs 2, in a format 1: of these four none need go for 4, one for 3, three for 1."""
    parent = found.parent

    def cost(architecture):
        return sum(1 if spec.format else 2 for _, slot, spec in architecture if slot == "attention" and not spec.empty)

    asked = []
    searched = SimpleNamespace(
        parent=parent,
        space=SimpleNamespace(quantised_parents={"parent@q8_0": parent.stored("q8_0")}),
        removable_layers={0, 1, 2, 3},
        meets=lambda limits, architecture: cost(architecture) <= limits["cost"],
        without=lambda layers: SimpleNamespace(solve=lambda limits: [layers]),
        architecture=parent.without,
    )
    trials = SimpleNamespace(best_run=lambda runs: asked.append(len(runs[0])) or runs[0])
    refinement = Refinement((searched,), Effort(removed_runs=1), trials)
    assert len(refinement._by_runs({"cost": most})) == len(asked)
    assert asked == expected
    assert "lets no whole layer go" not in capsys.readouterr().out
    searched.removable_layers.clear()
    assert refinement._by_runs({"cost": most}) == []
    assert ("lets no whole layer go" in capsys.readouterr().out) == bool(expected)
