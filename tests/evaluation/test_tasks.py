"""lm-eval on our children, and what is preserved."""

import gzip
import json
import math
import shutil

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.errors import DataError
from puzzle_nas.evaluation.harness import HarnessModel, choice_task
from puzzle_nas.evaluation.models import open_model
from puzzle_nas.evaluation.tasks import LoadedTasks, chance, evaluate_tasks
from puzzle_nas.scoring.likelihood import encode_pair, log_likelihoods
from tests.conftest import puzzle
from tests.evaluation.test_text import FLOAT32
from tests.stages.test_bad_input import check_refused

NAMES = ["king", "lord", "queen", "duke", "father", "mother", "brother", "sister"]


def spelling_items(number=120):
    """Words against nonsense: something that even the tiny parent has learned."""
    rows = []
    for place in range(number):
        name, question = NAMES[place % 8], f"{place} times I have told you, good sir, that this is my"
        choices = [name, "".join(reversed(name)) + "xq"]
        answer = place % 2
        rows.append({"question": question, "choices": choices if answer == 0 else choices[::-1], "answer": answer})
    return rows


def write_items(path, rows):
    text = "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("tasks") / "spelling.jsonl.gz", spelling_items())


@pytest.fixture(scope="module")
def coin(tmp_path_factory):
    rows = [
        {"question": f"Toss {i}:", "choices": ["heads", "tails"], "answer": ["heads", "tails"][i * 7919 % 11 % 2]}
        for i in range(60)
    ]
    return write_items(tmp_path_factory.mktemp("tasks") / "coin.jsonl", rows)  # fmt: skip


def test_log_likelihoods_are_lm_evals_own(tiny_run, tiny_parent):
    """Against stock HFLM, which takes every logit: several lengths, one token, and text longer than the context."""
    from lm_eval.api.instance import Instance

    texts = [("My lord,", " the king"), ("O", " death"), ("Speak to me of love ", "and war"), ("war " * 150, " peace")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in texts]
    for checkpoint in (tiny_parent, tiny_run / "child-gkd"):
        ours = HarnessModel(open_model(checkpoint, FLOAT32)).loglikelihood(requests)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        theirs = HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal").loglikelihood(requests)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)


def test_a_pair_is_split_as_lm_eval_splits_it(tiny_parent):
    model = HarnessModel(open_model(tiny_parent, FLOAT32))
    for context, continuation in (("My lord,", " the king"), ("My lord, ", "the king"), ("loveli", "ness")):
        assert encode_pair(model.tokenizer, context, continuation) == model._encode_pair(context, continuation)


def test_a_local_task_scores_what_transformers_computes(tiny_parent, spelling):
    items = read_task(spelling)
    found = evaluate_tasks(open_model(tiny_parent, FLOAT32), None, LoadedTasks.of([str(spelling)]))["tasks"]["spelling"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_parent), AutoTokenizer.from_pretrained(tiny_parent)

    def log_likelihood(question, choice):
        start, whole = tokenizer.encode(question), torch.tensor([tokenizer.encode(f"{question} {choice}")])
        with torch.no_grad():
            log_p = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
        return log_p[len(start) - 1 :].sum().item()

    right = [
        float(np.argmax([log_likelihood(item.question, choice) for choice in item.choices]) == item.answer)
        for item in items
    ]
    assert found["by_item"] == right and found["items"] == 120
    assert found["score"]["mean"] == pytest.approx(np.mean(right)) and np.mean(right) > 0.8


def test_preserved_and_what_is_left_out(tiny_run, spelling, coin, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ["--tasks", spelling, "--tasks", coin]
    result = json.loads(puzzle("evaluate", run, *arguments, "--json").stdout)
    assert list(result) == ["tasks"] and json.loads((run / "evaluations/tasks.json").read_text()) == result["tasks"]
    part = result["tasks"]
    assert part["left_out"] == ["coin"] and part["tasks"]["spelling"]["counted"]
    row = part["tasks"]["spelling"]
    ratio = np.mean(row["by_item"]) / np.mean(row["parent_by_item"])
    assert row["preserved"]["mean"] == pytest.approx(ratio) == part["average_preserved"]["mean"]
    assert row["preserved"]["low"] <= ratio <= row["preserved"]["high"]
    assert row["difference"]["mean"] == pytest.approx(row["score"]["mean"] - row["parent_score"]["mean"])
    text = puzzle("evaluate", run, *arguments, "--limit", 20).stdout
    assert "coin *" in text and "not above chance" in text


def test_the_report_shows_it_until_the_child_is_made_anew(tiny_run, coin, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    puzzle("evaluate", run, "--tasks", coin, "--long-context", "--max-length", 16, "--questions", 0)
    puzzle("write-report", run, "--again")
    report = (run / "report.html").read_text()
    assert "coin *" in report and "By length in tokens" in report
    puzzle("distill-child", run, "--again")
    puzzle("run", run / "recipe.yaml", "--run-dir", run)
    assert "coin *" in (run / "report.html").read_text()
    puzzle("distill-child", run, "gkd.learning_rate=0.0007")
    puzzle("run", run / "recipe.yaml", "--run-dir", run)
    assert "coin *" not in (run / "report.html").read_text()


def test_always_the_same_answer_is_chance(tmp_path):
    """A model that always says no gets the share of no: that is not above chance, though more than 1 / choices."""
    rows = [{"question": f"{i}?", "choices": ["Yes", "No"], "answer": int(i % 10 < 7)} for i in range(50)]
    same = choice_task("same", rows)
    assert chance(same, list(same.eval_docs)) == pytest.approx(0.7)
    rows = [{"question": f"{i}?", "choices": [f"a{i}", f"b{i}", f"c{i}"], "answer": 0} for i in range(9)]
    different = choice_task("different", rows)
    assert chance(different, list(different.eval_docs)) == pytest.approx(1 / 3)


def test_the_halves_are_apart_and_follow_from_the_content(spelling, tmp_path):
    items = read_task(spelling)
    halves = [half_of(items, for_scoring, spelling) for for_scoring in (True, False)]
    assert sorted(i.key for half in halves for i in half) == [i.key for i in items]
    assert all(len(half) > 40 for half in halves)
    shuffled = write_items(tmp_path / "other name.jsonl", spelling_items()[::-1])
    assert half_of(read_task(shuffled), True, shuffled) == halves[0]


def test_held_out_takes_the_other_half(tiny_parent, spelling):
    model = open_model(tiny_parent, FLOAT32)
    row = evaluate_tasks(model, None, LoadedTasks.of([str(spelling)], held_out=True))["tasks"]["spelling"]
    whole = evaluate_tasks(model, None, LoadedTasks.of([str(spelling)]))["tasks"]["spelling"]
    kept = [value for item, value in zip(read_task(spelling), whole["by_item"], strict=True) if not item.for_scoring]
    assert row["by_item"] == kept


def test_a_generative_task_and_several_metrics(tiny_parent):
    """A task as lm-eval's own are written: free answers through generate, exact match, chance 0."""
    import datasets

    from puzzle_nas.evaluation import tasks

    config = {
        "task": "echo",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"q": "My lord,", "a": "x"}] * 3)},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "doc_to_text": "q",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    from lm_eval.api.task import ConfigurableTask

    scores = tasks._scores(
        open_model(tiny_parent, FLOAT32), LoadedTasks({"echo": ConfigurableTask(config=config)}, (), 2)
    )["echo"]
    assert scores["metric"] == "exact_match" and scores["values"] == [0.0, 0.0] and not scores["chance"].any()


def test_our_children_are_models_for_lm_eval_itself(tiny_run, spelling):
    """Without anything of ours but the model class: AutoModel and stock HFLM."""
    rows = [{"question": i.question, "choices": list(i.choices), "answer": i.answer} for i in read_task(spelling)]
    child = AutoModelForCausalLM.from_pretrained(tiny_run / "child-gkd").eval()
    lm = HFLM(pretrained=child, tokenizer=AutoTokenizer.from_pretrained(tiny_run / "child-gkd"), backend="causal")
    tasks = [choice_task("spelling", rows)]
    stock = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    ours = evaluate_tasks(open_model(tiny_run / "child-gkd", FLOAT32), None, LoadedTasks.of([str(spelling)]))
    assert stock["results"]["spelling"]["acc,none"] == pytest.approx(ours["tasks"]["spelling"]["score"]["mean"])


def test_bad_items(tmp_path, tiny_parent):
    good = {"question": "q", "choices": ["a", "b"], "answer": "b"}
    assert read_task(write_items(tmp_path / "good.jsonl", [good]))[0].answer == 1
    for change, message in (
        ({"answer": 2}, "neither one of the choices nor its index"),
        ({"answer": True}, "neither one of the choices"),
        ({"choices": ["a"]}, "two or more choices"),
        ({"question": None}, "needs a question"),
    ):
        with pytest.raises(DataError, match=message):
            read_task(write_items(tmp_path / "bad.jsonl", [{**good, **change}]))
    with pytest.raises(DataError, match="no items"):
        read_task(write_items(tmp_path / "bad.jsonl", []))
    with pytest.raises(DataError, match="too few items"):
        half = read_task(tmp_path / "good.jsonl")
        half_of(half, not half[0].for_scoring, tmp_path / "good.jsonl")
    check_refused("evaluate", tiny_parent, "--tasks", tmp_path / "no.jsonl", contains=["There is no task file"])
    check_refused("evaluate", tiny_parent, "--tasks", "no_such_task", contains=["no_such_task", "lm-eval"])


def test_real_benchmarks(tiny_parent, pytestconfig):
    folder = pytestconfig.rootpath.parent / "shared/data/benchmarks"
    if not folder.is_dir():
        pytest.skip("the benchmark files are not on this machine")
    model = open_model(tiny_parent, FLOAT32)
    for path in sorted(folder.glob("*.jsonl.gz")):
        row = evaluate_tasks(model, None, LoadedTasks.of([str(path)], 4))["tasks"][path.name.split(".")[0]]
        assert row["items"] == 4 and 0 < row["chance"] <= 1 and math.isfinite(row["score"]["mean"])


def test_pairs_in_any_order_give_the_same(tiny_parent):
    model = open_model(tiny_parent, FLOAT32)
    pairs = [encode_pair(model.tokenizer, "My lord,", " " + "love " * n) for n in (5, 1, 30, 2)]
    together = log_likelihoods(model, pairs, 128)
    apart = [log_likelihoods(model, [pair], 128)[0] for pair in pairs]
    assert [v for v, _ in together] == pytest.approx([v for v, _ in apart], abs=1e-4)
