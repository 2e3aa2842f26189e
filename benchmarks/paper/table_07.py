"""Puzzle, table 7: the text of distillation. Reads benchmarks/results/data_sources.json.

The paper varies BLD's text and reads MMLU; ours varies GKD's and reads KL on general text.
"""

from benchmarks.paper.common import Budget, Measured, Table, figures_of, ordering

PAPER = {"one narrow source": 74.84, "mixture": 78.39}


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/data_sources.py`."""
    figures = figures_of("data_sources")
    column = f"GKD on {figures['gkd_tokens']} tokens"
    rows = {
        "one narrow source": figures["general_kl_nats.python_stdlib"],
        "mixture": figures["general_kl_nats.general_text"],
        "before": figures["general_kl_nats.before"],
        "the parent's own samples": figures["general_kl_nats.parent_samples"],
    }
    claims = ordering(PAPER, {column: rows})
    claims[f"{column}: one narrow source still helps"] = rows["one narrow source"] < rows["before"]
    remark = "The text measured on is of the same kinds as the mixture, which favours it."
    return Measured({column: rows}, claims, remark)


TABLE = Table("table_07", "Table 7: text of distillation", "MMLU", PAPER, "KL on general text, nats", measure)

if __name__ == "__main__":
    TABLE.main()
