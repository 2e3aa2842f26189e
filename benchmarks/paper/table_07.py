"""Puzzle, table 7: the text of distillation. Reads benchmarks/results/data_sources.json, a settled experiment.

The paper varies BLD's text and reads MMLU; ours varies the text of the whole run and reads KL on general text.
"""

from benchmarks.paper.common import Budget, Measured, Table, figures_of, ordering

PAPER = {"one narrow source": 74.84, "mixture": 78.39}
STAGES = {"before GKD": "refitted", "after GKD": "distilled"}


def measure(budget: Budget) -> Measured:
    """KL on general text of three runs that differ in their text (docs/results.md, sources of text)."""
    figures = figures_of("data_sources")
    columns = {
        column: {
            "one narrow source": figures[f"general_kl_nats.python_stdlib.{stage}"],
            "mixture": figures[f"general_kl_nats.general_text.{stage}"],
            "half narrow, half the parent's samples": figures[f"general_kl_nats.stdlib_1_samples_1.{stage}"],
        }
        for column, stage in STAGES.items()
    }
    remark = "The text measured on is of the same kinds as the mixture, which favours it."
    return Measured(columns, ordering(PAPER, columns), remark)


TABLE = Table("table_07", "Table 7: text of distillation", "MMLU", PAPER, "KL on general text, nats", measure)

if __name__ == "__main__":
    TABLE.main()
