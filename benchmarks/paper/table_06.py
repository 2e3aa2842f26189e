"""Puzzle, table 6: coupled against decoupled BLD. Reads benchmarks/results/distillation.json."""

from benchmarks.paper.common import Budget, Measured, Table, figures_of, ordering

PAPER = {"decoupled": 72.92, "decoupled, then coupled": 73.98}


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/distillation.py`: children of both libraries at equal cost and tokens, not distilled."""
    figures = figures_of("distillation")
    column = f"{figures['coupled_speedup_asked']:g}x, {figures['coupled_tokens']:,.0f} tokens a variant"
    columns = {
        column: {
            "decoupled": figures["validation_kl_nats_decoupled"],
            "decoupled, then coupled": figures["validation_kl_nats_coupled"],
        }
    }
    same = figures["coupled_kl_over_decoupled_same_architecture"]
    remark = (
        f"On the second search's architecture coupled weights have {same:.3f} times the KL of decoupled ones with as "
        "many tokens."
    )
    return Measured(columns, ordering(PAPER, columns), remark)


TABLE = Table("table_06", "Table 6: coupled and decoupled BLD", "accuracy", PAPER, "KL, nats", measure)

if __name__ == "__main__":
    TABLE.main()
