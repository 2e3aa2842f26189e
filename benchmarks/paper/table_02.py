"""Puzzle, table 2: accuracy preserved by task. Reads the results of evaluation.py and alternatives.py."""

from benchmarks.paper.common import Budget, Measured, Table, figures_of

PAPER = {"MMLU": 98.2, "GSM8K": 99.3, "HellaSwag": 99.0, "average": 98.4}
ACCURACY = "accuracy_parent_"


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/evaluation.py`: other tasks than the paper's, of which a parent of 135 M parameters
    answers few better than chance.
    """
    figures = figures_of("evaluation")
    tasks = [name.removeprefix(ACCURACY) for name in figures if name.startswith(ACCURACY)]
    columns = {
        column: {
            f"{task}" + ("" if figures[f"parent_above_chance_{task}"] else " *"): 100 * figures[key + task]
            for task in tasks
        }
        for column, key in (("parent", ACCURACY), ("child", "accuracy_child_"), ("chance", "chance_"))
    }
    preserved = {
        task: 100 * figures[f"accuracy_child_{task}"] / figures[ACCURACY + task]
        for task in tasks
        if figures[f"parent_above_chance_{task}"]
    }
    columns["preserved"] = preserved | {"average": sum(preserved.values()) / len(preserved)} if preserved else {}
    claims = {f"{task}: 95 % preserved": share >= 95 for task, share in preserved.items()}
    few, many = figures_of("alternatives_avx512"), figures_of("alternatives_gpu")
    after = " and ".join(
        f"{100 * found[f'accuracy_{task}_puzzle_1.5x'] / found[f'accuracy_{task}_parent']:.0f} % "
        f"after {found['gkd_tokens_puzzle_1.5x']:,} tokens of GKD"
        for found, task in ((few, "continuations"), (many, "continuations_unread"))
    )
    note = (
        "\\* The parent is not above chance there: preserving that says nothing. More tokens preserve more, and the "
        f"paper's children saw billions: at 1.5x {after} (alternatives_avx512.json, alternatives_gpu.json)."
    )
    return Measured(columns, claims, note)


TABLE = Table("table_02", "Table 2: accuracy preserved by task", "% preserved", PAPER, "accuracy, %", measure)

if __name__ == "__main__":
    TABLE.main()
