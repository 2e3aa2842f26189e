"""`puzzle search RUN --for draft` on the tiny run: what is predicted of drafts, and that it follows from the run."""

import json
import math
import random
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.drafts import (
    TOKEN_LIMIT,
    Acceptance,
    DraftCosts,
    fit_disagreement,
    fit_kl,
    linear_verification,
    search_drafts,
)
from puzzle_nas.choosing.speculation import speedup
from puzzle_nas.effort import Effort
from puzzle_nas.errors import InfeasibleError, RecipeError
from puzzle_nas.pipeline import open_run
from puzzle_nas.report.tables import draft_note
from puzzle_nas.stages import search_architecture
from tests.conftest import puzzle


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run with measured candidates."""
    folder = RunFolder(shutil.copytree(tiny_run, tmp_path_factory.mktemp("drafts") / "run"))
    recipe = open_run(folder)
    found = search_architecture.search_measured(recipe, folder, Effort(by_sums=4), attempts=0)
    write_json(folder.architecture(), found)
    return folder


@pytest.fixture(scope="module")
def found(run):
    return ArchitectureSearch.load(open_run(run), run)


@pytest.fixture(scope="module")
def drafts(run):
    return search_drafts(open_run(run), run, {})


def test_disagreement_is_a_root_of_kl_and_says_how_far_it_is_off():
    draw = random.Random(0)
    kls = [draw.uniform(1e-3, 0.9) for _ in range(2000)]
    exact = [(kl, 1 - 0.5 * math.sqrt(kl)) for kl in kls]
    assert fit_disagreement(exact) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9), 2000)
    noisy = [(kl, agreement + draw.gauss(0, 0.03)) for kl, agreement in exact]
    slope, error, _ = fit_disagreement(noisy)
    assert slope == pytest.approx(0.5, rel=0.02) and error == pytest.approx(0.03, rel=0.1)
    # The parent itself says nothing, what is far from it follows no root.
    assert fit_disagreement([*exact, (0.0, 1.0), (9.0, 0.01)]) == fit_disagreement(exact)
    with pytest.raises(RecipeError, match="variants nearer to the parent"):
        fit_disagreement([(0.0, 1.0), (9.0, 0.01)])


def test_kl_of_a_child_is_its_summed_score_as_often_as_measured():
    assert fit_kl([(s, 0.8 * s + 0.002) for s in (0.01, 0.1, 1.0)], 0.002) == (pytest.approx(0.8), pytest.approx(0), 3)
    ratio, error, count = fit_kl([(0.1, 0.05), (0.1, 0.1), (0.1, 0.2)], 0.0)
    assert (ratio, count) == (1.0, 3) and error == pytest.approx(math.sqrt(2 / 3) * math.log(2))
    assert fit_kl([(0.0, 0.002)], 0.002) == (1.0, None, 0)


def test_acceptance_is_what_the_run_measured(run, found):
    acceptance = Acceptance.of(run, found, "kl")
    evaluation = read_json(run / "evaluation.json")
    models = [*evaluation["child"].values(), *evaluation["baselines"].values()]
    near = [model for model in models if model["kl_nats"] <= 1]
    assert near and acceptance.models_compared > len(found.scores) / 2
    for model in near:
        predicted = 1 - acceptance.disagreement * math.sqrt(model["kl_nats"])
        assert predicted == pytest.approx(model["top1_agreement"], abs=4 * acceptance.disagreement_error)
    assert acceptance.children_measured == len(list((run / "search/main/candidates").glob("*.json"))) >= 2
    for path in (run / "search/main/candidates").glob("*.json"):
        candidate = read_json(path)
        sums = found.score_of(Architecture.from_list(candidate["architecture"]))
        ratio = min(candidate["selection_kl_nats"].values()) / acceptance.kl_nats(sums)
        assert abs(math.log(ratio)) <= math.sqrt(acceptance.children_measured) * acceptance.kl_error + 1e-9


def test_acceptance_falls_from_one_and_sampling_has_its_bound():
    acceptance = Acceptance(0.5, 0.02, 9, 0.8, 0.1, 4, 0.0)
    assert acceptance.greedy(0.0) == (1.0, 0.02) and acceptance.sampled_at_least(0.0) == 1
    assert acceptance.greedy(0.2) == (pytest.approx(0.8), pytest.approx(math.hypot(0.02, 0.2 * 0.1 / 2)))
    assert acceptance.sampled_at_least(0.2) == pytest.approx(1 - math.sqrt(0.08))
    assert acceptance.greedy(100.0)[0] == acceptance.sampled_at_least(100.0) == 0
    # Rounding moves the distribution, and hardly which token is the most likely.
    rounded = replace(acceptance, kl_nats_of_rounding=0.02)
    assert rounded.greedy(0.2) == pytest.approx(acceptance.greedy(0.2))
    assert rounded.sampled_at_least(0.0) == pytest.approx(0.9) and rounded.kl_nats(0.2) == pytest.approx(0.18)


def test_every_draft_is_the_best_child_of_its_cost(drafts, found, run):
    rows, parent = drafts["rows"], found.costs.total("decode_step_ms", found.parent)
    assert len(rows) > 5
    for row in rows:
        draft = Architecture.from_list(row["architecture"])
        step = found.costs.total("decode_step_ms", draft)
        assert step <= row[TOKEN_LIMIT] and row["cost_ratio"] == pytest.approx(step / parent)
        (best,) = found.solve({TOKEN_LIMIT: row[TOKEN_LIMIT]}, 0.0, 60)
        assert row["score_sum"] == pytest.approx(best.score, rel=1e-3)
    for slower, faster in pairwise(rows):
        assert faster["cost_ratio"] < slower["cost_ratio"] and faster["score_sum"] > slower["score_sum"]
        assert faster["acceptance_predicted"] <= slower["acceptance_predicted"]


def test_speedups_follow_from_the_row(drafts, found):
    verification = linear_verification(drafts["pass_cost_per_draft"])
    for row in drafts["rows"]:
        again = speedup(row["acceptance_predicted"], row["cost_ratio"], row["drafts"], verification)
        assert row["speedup_predicted"] == pytest.approx(again)
        draft = Architecture.from_list(row["architecture"])

        def request_ms(answers: float, row=row, draft=draft) -> float:
            decode = found.costs.total("runtime_ms", found.parent) - found.costs.total("prefill_ms", found.parent)
            prompts = [found.costs.total("prefill_ms", model) for model in (found.parent, draft)]
            return sum(prompts) + answers * decode / row["speedup_predicted"]

        alone = found.costs.mix_ms(found.parent)
        assert row["request_speedup_predicted"] == pytest.approx(alone / request_ms(1))
        assert (row["answers_from"] is None) == (row["speedup_predicted"] <= 1)


def test_a_pass_over_several_tokens_costs_what_prompts_do(run, found):
    scenario, parent = found.costs.scenarios[0], found.parent
    prefill = found.costs.total("prefill_ms", parent)
    step = found.costs.total("decode_step_ms", parent)
    head = parent_head(run, found)
    body = found.costs.parameters(parent) - head
    expected = (prefill - step) / (scenario.prefill_tokens - 1) * (body + head) / body / step
    assert DraftCosts(found.costs, parent).per_draft == pytest.approx(expected)


def parent_head(run, found):
    return found.costs.columns_of(len(found.parent.layers), found.parent.head)["parameters"]


@pytest.fixture
def recosted(run, tmp_path):
    """The drafts that are found where times are others: a function of each part's own times."""

    def search(change, **scenario):
        copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
        recipe = open_run(copy)
        path = copy.costs(recipe.engine)
        table = read_json(path)
        for of_scenario in table["scenarios"].values():
            of_scenario["fixed"] = change(None, of_scenario["fixed"])
            for variants in of_scenario["variants"].values():
                variants |= {name: change(name, times) for name, times in variants.items()}
        write_json(path, table)
        scenarios = [s.model_copy(update=scenario) for s in recipe.scenarios]
        return search_drafts(recipe.model_copy(update={"scenarios": scenarios}), copy, {})

    return search


def test_it_says_which_draft_pays(recosted):
    """Where weights are all that takes time: a prompt takes as long as a token, and little is left without layers."""

    def bound_by_weights(name, times):
        step = times["decode_step_ms"] * (0.01 if name is None else 1)
        return {"prefill_ms": step, "decode_step_ms": step}

    drafts = recosted(bound_by_weights)
    assert drafts["pass_cost_per_draft"] == 0 and drafts["pays"]
    best = drafts["best"]
    assert best["request_speedup_predicted"] == max(row["request_speedup_predicted"] for row in drafts["rows"]) > 1
    assert best["cost_ratio"] < best["break_even_cost_ratio"]
    note = draft_note(drafts)
    assert f"requests {best['request_speedup_predicted']:.3f}x as fast" in note and f"{best['drafts']} draft" in note


def test_it_says_which_draft_pays_for_longer_answers(recosted):
    """As above, but that prompts take forty times as long as a token: nothing pays for answers of seven more."""

    def long_prompts(name, times):
        step = times["decode_step_ms"] * (0.01 if name is None else 1)
        return {"prefill_ms": 40 * step, "decode_step_ms": step}

    drafts = recosted(long_prompts, prefill_tokens=4096)
    best = drafts["best"]
    assert not drafts["pays"] and best["speedup_predicted"] > 1 > best["request_speedup_predicted"]
    assert best["answers_from"] == min(row["answers_from"] for row in drafts["rows"] if row["answers_from"]) > 1
    assert f"or for answers {best['answers_from']:.1f} times as long" in draft_note(drafts)


def test_it_says_at_which_cost_a_draft_would_pay_or_that_none_would(drafts, recosted):
    slow = drafts | {"best": drafts["best"] | {"break_even_cost_ratio": 0.25, "answers_from": None}, "pays": False}
    assert "No draft pays" in draft_note(slow) and "pays below a cost ratio of 0.250." in draft_note(slow)

    def bound_by_arithmetic(name, times):
        return {"prefill_ms": 16 * times["decode_step_ms"], "decode_step_ms": times["decode_step_ms"]}

    none = recosted(bound_by_arithmetic)
    assert none["pass_cost_per_draft"] >= 1 and not none["pays"]
    assert "pays at no cost ratio, however low." in draft_note(none)


def test_what_scenarios_do_not_say(recosted, drafts, run):
    with pytest.raises(RecipeError, match="two tokens or more"):
        recosted(lambda _, times: times, prefill_tokens=1)


def test_what_scores_do_not_say_and_limits_that_hold(run, drafts):
    recipe = open_run(run)
    by_task = recipe.scoring.model_copy(update={"metric": "task_margin"})
    with pytest.raises(RecipeError, match="Scores of a task"):
        search_drafts(recipe.model_copy(update={"scoring": by_task}), run, {})
    memory = drafts["rows"][len(drafts["rows"]) // 2]["memory_bytes"]
    smaller = search_drafts(recipe, run, {"memory_bytes": memory})["rows"]
    assert smaller and all(row["memory_bytes"] <= memory for row in smaller)
    with pytest.raises(InfeasibleError, match="can reach"):
        search_drafts(recipe, run, {"memory_bytes": 1.0})


def test_the_command(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    said = puzzle("search", copy, "--for", "draft").stdout
    kept = json.loads((copy / "search/drafts.json").read_text())
    assert draft_note(kept) in " ".join(said.split()) and f"{kept['best']['cost_ratio']:.3f}" in said
    assert json.loads(puzzle("search", copy, "--for", "draft", "--json").stdout) == kept
    # Without measured children the sum stands for the KL, and nothing is claimed of its error.
    assert kept["acceptance"]["children_measured"] == 0 and kept["acceptance"]["kl_error"] is None
    refused = puzzle("search", "--table", tmp_path / "table.csv", "--for", "draft", check=False)
    assert refused.returncode == 2 and "leave out --table" in refused.stderr
