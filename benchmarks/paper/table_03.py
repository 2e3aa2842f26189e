"""Puzzle, table 3: speed-up by scenario, on the engines that serve. Reads benchmarks/results/engines.json."""

from benchmarks.paper.common import Budget, Measured, Table, figures_of

SCALE = 16
"""Lengths of benchmarks/engines.py are the paper's over this."""
PAPER = {"128/128": 2.07, "128/1024": 2.17, "128/2048": 1.76, "128/4096": 2.11, "2048/128": 1.92, "2048/2048": 1.96}
ENGINES = {"llama.cpp": "llama_cpp", "vLLM": "vllm", "vLLM, not compiled": "vllm_eager"}


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/engines.py`: tokens per second of the child over the parent's, each at its best batch."""
    figures = figures_of("engines")
    columns = {
        engine: {
            row: figures[f"speedup_{label}_" + "_".join(str(int(length) // SCALE) for length in row.split("/"))]
            for row in PAPER
        }
        for engine, label in ENGINES.items()
    }
    claims = {
        f"{engine}, {row}: the child is faster": speedup > 1
        for engine, rows in columns.items()
        for row, speedup in rows.items()
    }
    remark = f"Our child was asked for 1.5x; its lengths are the paper's over {SCALE}."
    return Measured(columns, claims, remark)


TABLE = Table("table_03", "Table 3: speed-up by input/output tokens", "speed-up", PAPER, "speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
