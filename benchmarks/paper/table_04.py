"""Puzzle, tables 4 and 14: long context. Reads benchmarks/results/evaluation.json."""

from benchmarks.paper.common import Budget, Measured, Table, figures_of

PAPER = {"1k": 99.9, "4k": 98.65, "16k": 96.2, "32k": 87.9, "64k": 14.9}
FOUND = "answers_found_parent_at_"


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/evaluation.py`: answers found to questions in the manner of RULER, child over parent."""
    figures = figures_of("evaluation")
    lengths = sorted(int(name.removeprefix(FOUND)) for name in figures if name.startswith(FOUND))
    rows = {
        column: {f"ours, {length} tokens": figures[f"{key}_{length}"] * scale for length in lengths}
        for column, key, scale in (
            ("parent finds, %", "answers_found_parent_at", 100),
            ("child finds, %", "answers_found_child_at", 100),
            ("KL, nats", "kl_nats_at", 1),
        )
    }
    rows["preserved, %"] = {
        f"ours, {length} tokens": 100 * figures[f"answers_found_child_at_{length}"] / figures[f"{FOUND}{length}"]
        for length in lengths
        if figures[f"{FOUND}{length}"]
    }
    preserved = list(rows["preserved, %"].values())
    claims = {"less is preserved at the longest length than at the shortest": preserved[-1] < preserved[0]}
    return Measured(rows, claims, "Our child was distilled on sequences of 256 tokens, the paper's on 8k.")


TABLE = Table("table_04", "Tables 4 and 14: long context", "% of RULER preserved", PAPER, "by length", measure)

if __name__ == "__main__":
    TABLE.main()
