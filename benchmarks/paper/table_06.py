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
    return Measured(columns, ordering(PAPER, columns))


TABLE = Table("table_06", "Table 6: coupled and decoupled BLD", "accuracy", PAPER, "KL, nats", measure)

if __name__ == "__main__":
    TABLE.main()
