"""Children chosen by a task: scores on one half of its items, figures on the other."""

import json
import shutil

import pytest
import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.task_items import TaskItem, half_of, read_task
from puzzle_nas.evaluation.models import Evaluated, open_model
from puzzle_nas.evaluation.tasks import LoadedTasks, evaluate_tasks
from puzzle_nas.families import architecture_of, build, child_config, load_parent, load_tokenizer
from puzzle_nas.library import variant_subblock, variant_weights
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.likelihood import log_likelihoods
from puzzle_nas.scoring.task_scores import TaskResult, TaskWalk, TokenisedTask, task_score
from puzzle_nas.specs import GatedFFN, GroupedAttention
from tests.conftest import puzzle
from tests.evaluation.test_tasks import spelling, spelling_items, write_items  # noqa: F401
from tests.evaluation.test_text import FLOAT32
from tests.stages.test_bad_input import check_refused


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Items with two to four choices."""
    rows = []
    for place, row in enumerate(spelling_items()):
        more = ["love", "good father"][: place % 3]
        rows.append({**row, "question": f"Indeed, {row['question']}", "choices": [*row["choices"], *more]})
    return write_items(tmp_path_factory.mktemp("tasks") / "uneven.jsonl", rows)


def test_the_walk_answers_as_lm_eval_does(tiny_run, tiny_parent, uneven):
    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    items = read_task(uneven)
    walk = TaskWalk(parent, TokenisedTask.of(items, load_tokenizer(tiny_parent), 128), 256)
    itself = walk.model_itself()
    row = evaluate_tasks(open_model(tiny_parent, FLOAT32), None, LoadedTasks.of([str(uneven)]))["tasks"]["uneven"]
    assert itself.accuracy.tolist() == row["by_item"] and 0 < itself.accuracy.mean() < 1
    assert (itself.margin[itself.accuracy == 1] > 0).all() and (itself.margin[itself.accuracy == 0] <= 0).all()
    assert task_score(itself, itself, "margin")["task_loss"]["mean"] == 0


def test_a_parent_at_chance_is_named(tiny_parent):
    items = [TaskItem(f"{number} +", ("1", "2"), 0) for number in range(20)]
    task = TokenisedTask.of(items, load_tokenizer(tiny_parent), 128)
    margin = torch.zeros(20)
    guesses, knows = (TaskResult(margin, (torch.arange(20) < right).double()) for right in (12, 19))
    assert "60.0 % of the task's 20 items right, no better than chance (50.0 %)" in task.doubt(guesses)
    assert not task.doubt(knows)


def test_a_variants_score_is_what_the_model_with_it_loses(tiny_run, tiny_parent, uneven):
    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    tokenizer = load_tokenizer(tiny_parent)
    task = TokenisedTask.of(read_task(uneven), tokenizer, 128)
    walk = TaskWalk(parent, task, 256)
    before = walk.model_itself()
    for _ in range(2):
        walk.advance()
    for slot, spec in (("attention", GroupedAttention(1)), ("ffn", GatedFFN(96))):
        (found,) = walk.try_variants([{slot: variant_subblock(run, parent, 2, spec)}])
        prefix = {"attention": "model.layers.2.self_attn", "ffn": "model.layers.2.mlp"}[slot]
        weights = {n: w for n, w in parent.state_dict().items() if not n.startswith(prefix)}
        weights |= {f"model.layers.2.{n}": w for n, w in variant_weights(run, parent, 2, spec).items()}
        child = build(child_config(parent.config, architecture_of(parent.config).replaced(2, spec)), weights)
        pairs = []
        for item in read_task(uneven):
            start = tokenizer.encode(item.question)
            pairs += [(start, tokenizer.encode(f"{item.question} {c}")[len(start) :]) for c in item.choices]
        values = torch.tensor([v for v, _ in log_likelihoods(Evaluated(child, tokenizer), pairs, 128)])
        assert found.margin.tolist() == pytest.approx(task.measured(values).margin.tolist(), abs=1e-3)
        score = task_score(found, before, "margin")
        assert score["task_loss"]["mean"] == pytest.approx((before.margin - found.margin).mean().item())
        assert score["task_loss"]["mean"] != 0


@pytest.fixture(scope="module")
def task_run(tiny_run, uneven, tmp_path_factory):
    """A copy of a finished run, scored and searched anew by the task."""
    run = tmp_path_factory.mktemp("by-task") / "run"
    shutil.copytree(tiny_run, run)
    settings = ["scoring.metric=task_margin", f"scoring.task={uneven}", "gkd.tokens=0"]
    puzzle("run", tiny_run.parent / "tiny.yaml", *settings, "--run-dir", run)
    return run


def test_a_run_scored_by_its_task(task_run, tiny_run, uneven):
    scores = {p.name: json.loads(p.read_text()) for p in (task_run / "scores/main/task_margin").iterdir()}
    assert scores.keys() == {p.name for p in (tiny_run / "scores/main/kl").iterdir()}
    assert not (task_run / "scores/main/kl").exists() or not list((task_run / "scores/main/kl").iterdir())
    half = half_of(read_task(uneven), True, uneven)
    assert all(len(score["task_loss_by_item"]) == len(half) for score in scores.values())
    search = json.loads((task_run / "search/main/architecture.json").read_text())
    total = 0.0
    for row in search["architecture"]:
        from puzzle_nas.specs import spec_from_dict

        for slot in ("attention", "ffn"):
            name = f"layer_{row['layer']:02d}.{spec_from_dict(row[slot]).id}.json"
            total += scores[name]["task_loss"]["mean"] if name in scores else 0.0
    assert search["score_sum"] == pytest.approx(total, abs=1e-6)
    assert "loss of margin on the task" in (task_run / "report.html").read_text()
    frontier = puzzle("frontier", task_run, "--limit-range", "speedup=1.05:1.1:2")
    assert (
        "frontier.json" in frontier.stdout
        and "loss of margin on the task" in (task_run / "search/frontier.html").read_text()
    )


def test_the_report_is_on_the_other_half(task_run, uneven, spelling):  # noqa: F811
    found = json.loads(puzzle("evaluate", task_run, "--json").stdout)
    row = found["tasks"]["tasks"]["uneven"]
    other = half_of(read_task(uneven), False, uneven)
    assert row["held_out_half"] and row["items"] == len(other) and "text" in found
    named = json.loads(puzzle("evaluate", task_run, "--tasks", uneven, "--tasks", spelling, "--json").stdout)["tasks"]
    assert named["tasks"]["uneven"]["by_item"] == row["by_item"]
    # Items that were no part of it are all there.
    assert named["tasks"]["spelling"]["items"] == 120 and not named["tasks"]["spelling"]["held_out_half"]


def test_a_changed_task_is_scored_anew(task_run, uneven, tmp_path):
    run = shutil.copytree(task_run, tmp_path / "run")
    assert "already done" in puzzle("score-blocks", run).stdout
    few = tmp_path / "few.jsonl"
    lines = uneven.read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:40]))
    items = half_of(read_task(few), True, few)
    puzzle("score-blocks", run, f"scoring.task={few}", "scoring.metric=task_accuracy")
    scores = [json.loads(p.read_text()) for p in (run / "scores/main/task_accuracy").iterdir()]
    assert all(len(score["task_loss_by_item"]) == len(items) for score in scores)
    assert all(value in (-1, 0, 1) for score in scores for value in score["task_loss_by_item"])


def test_mistakes(tiny_run, tmp_path, uneven):
    recipe, to = tiny_run.parent / "tiny.yaml", ("--run-dir", tmp_path / "r")
    check_refused("run", recipe, "scoring.metric=task_margin", *to, contains=["scoring.task", "belong together"])
    check_refused("run", recipe, f"scoring.task={uneven}", *to, contains=["belong together"])
    both = ("scoring.metric=task_margin", f"scoring.task={uneven}")
    check_refused("run", recipe, *both, "search.effort=normal", *to, contains=["chooses by KL", "set it to fast"])
    gone = ("scoring.metric=task_margin", f"scoring.task={tmp_path}/gone.jsonl")
    check_refused("run", recipe, *gone, *to, contains=["no task file"])
    assert not (tmp_path / "r").exists()
