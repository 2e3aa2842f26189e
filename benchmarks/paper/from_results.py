"""Tables 2, 3, 4 and 13 from what other commands kept; tables 5 to 8 and figure 4, whose scripts are gone."""

from __future__ import annotations

from benchmarks.common import kept
from benchmarks.paper.common import SPEEDUPS, Budget, Measured, ordering, table
from puzzle_nas.artifacts import read_json
from puzzle_nas.errors import DataError
from puzzle_nas.evaluation.evaluate import evaluation_path

SCALE = 16
"""Lengths of the benchmark `engines` are the paper's over this."""
SCENARIOS = {"128/128": 2.07, "128/1024": 2.17, "128/2048": 1.76, "128/4096": 2.11, "2048/128": 1.92, "2048/2048": 1.96}
ENGINES = {"llama.cpp": "llama_cpp", "vLLM": "vllm", "vLLM, not compiled": "vllm_eager"}
WITH_GKD = {"without GKD": 69.06, "with GKD": 73.98}
SIBLING = {"parent": 76.4, "child": 73.98, "sibling": 70.36}
COUPLED = {"decoupled": 72.92, "decoupled, then coupled": 73.98}
TEXT = {"one narrow source": 74.84, "mixture": 78.39}
BLD = {"least": 78.27, "more": 78.44, "most": 78.54}
PREFERENCE = {"child against parent": "no significant difference"}
PREFERENCE_UNIT = (
    "score with its 95 % interval (0.5 is a draw), and the share of decided votes for what was shown first"
)
TASKS = {"MMLU": 98.2, "GSM8K": 99.3, "HellaSwag": 99.0, "average": 98.4}
RULER = {"1k": 99.9, "4k": 98.65, "16k": 96.2, "32k": 87.9, "64k": 14.9}
MODELS = ("puzzle", "greedy", "random", "depth_pruned", "width_pruned")


def evaluated(budget: Budget, part: str) -> dict[str, dict]:
    """By task or length, what `puzzle evaluate` kept in the run.

    Raises:
        DataError: it was not asked to.
    """
    path = evaluation_path(budget.run, part)
    if not path.exists():
        raise DataError(f"{path} is missing. Make it with: puzzle evaluate {budget.run} --tasks FILE --long-context")
    return read_json(path)["lengths" if part == "long_context" else part]


@table("table_02", "Table 2: accuracy preserved by task", "% preserved", TASKS, "accuracy, %")
def preserved_by_task(budget: Budget) -> Measured:
    """Other tasks than the paper's, of which a parent of 135 M parameters answers few better than chance."""
    tasks = evaluated(budget, "tasks")
    names = {task: task if found["counted"] else f"{task} *" for task, found in tasks.items()}
    columns = {
        "parent": {names[task]: 100 * found["parent_score"]["mean"] for task, found in tasks.items()},
        "child": {names[task]: 100 * found["score"]["mean"] for task, found in tasks.items()},
        "chance": {names[task]: 100 * found["chance"] for task, found in tasks.items()},
    }
    preserved = {task: 100 * columns["child"][task] / columns["parent"][task] for task in names if names[task] == task}
    columns["preserved"] = preserved | {"average": sum(preserved.values()) / len(preserved)} if preserved else {}
    after = " and ".join(
        f"{100 * found[f'accuracy_{task}_puzzle_1.5x'] / found[f'accuracy_{task}_parent']:.0f} % "
        f"after {found['gkd_tokens_puzzle_1.5x']:,} tokens of GKD"
        for found, task in (
            (kept("alternatives_avx512"), "continuations"),
            (kept("alternatives_gpu"), "continuations_unread"),
        )
    )
    note = (
        "\\* The parent is not above chance there: preserving that says nothing. More tokens preserve more, and the "
        f"paper's children saw billions: at 1.5x {after} (alternatives_avx512.json, alternatives_gpu.json)."
    )
    return Measured(columns, {f"{task}: 95 % preserved": share >= 95 for task, share in preserved.items()}, note)


@table("table_03", "Table 3: speed-up by input/output tokens", "speed-up", SCENARIOS, "speed-up")
def speedup_by_scenario(budget: Budget) -> Measured:
    """Tokens per second of the child over the parent's, each at its best batch, on the engines that serve."""
    figures = kept("engines")
    columns = {
        engine: {
            row: figures[f"speedup_{label}_" + "_".join(str(int(length) // SCALE) for length in row.split("/"))]
            for row in SCENARIOS
        }
        for engine, label in ENGINES.items()
    }
    claims = {
        f"{engine}, {row}: the child is faster": speedup > 1
        for engine, rows in columns.items()
        for row, speedup in rows.items()
    }
    return Measured(columns, claims, f"Our child was asked for 1.5x; its lengths are the paper's over {SCALE}.")


@table("table_04", "Tables 4 and 14: long context", "% of RULER preserved", RULER, "by length")
def long_context(budget: Budget) -> Measured:
    """Answers found to questions in the manner of RULER, child over parent."""
    lengths = {f"ours, {length} tokens": row for length, row in evaluated(budget, "long_context").items()}
    parent = {row: 100 * found["average"]["parent_score"]["mean"] for row, found in lengths.items()}
    child = {row: 100 * found["average"]["score"]["mean"] for row, found in lengths.items()}
    kl = {row: found["text"]["kl_nats"]["mean"] for row, found in lengths.items()}
    preserved = {row: 100 * child[row] / parent[row] for row in lengths if parent[row]}
    columns = {"parent finds, %": parent, "child finds, %": child, "KL, nats": kl, "preserved, %": preserved}
    shares = list(preserved.values())
    claims = {"less is preserved at the longest length than at the shortest": shares[-1] < shares[0]}
    return Measured(columns, claims, "Our child was distilled on sequences of 256 tokens, the paper's on 8k.")


@table("table_13", "Table 13: with and without GKD", "accuracy", WITH_GKD, "KL, nats")
def with_and_without_gkd(budget: Budget) -> Measured:
    """Our children, and every other way of making one, of the benchmark `alternatives`."""
    figures = kept("alternatives")
    columns = {
        f"{model} {speedup}x": {
            "without GKD": figures[f"kl_{model}_before_gkd_{speedup}x"],
            "with GKD": figures[f"kl_{model}_{speedup}x"],
        }
        for speedup in SPEEDUPS
        for model in MODELS
        if f"kl_{model}_{speedup}x" in figures
    }
    return Measured(columns, ordering(WITH_GKD, columns))


for settled in (
    ("table_05", "Table 5: a smaller sibling at equal speed", "accuracy", SIBLING, "by model"),
    ("table_06", "Table 6: coupled and decoupled BLD", "accuracy", COUPLED, "KL, nats"),
    ("table_07", "Table 7: text of distillation", "MMLU", TEXT, "KL on general text, nats"),
    ("table_08", "Table 8: tokens of BLD", "MMLU", BLD, "mean replace-1-block KL, nats"),
    ("figure_4", "Figure 4: blind preference", "finding", PREFERENCE, PREFERENCE_UNIT),
):
    table(*settled)(None)
