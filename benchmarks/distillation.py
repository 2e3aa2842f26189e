"""Distillation: throughput, coupled against decoupled BLD, elastic widths. Reads runs/quickstart.

python benchmarks/distillation.py          all parts; benchmarks/results/distillation.json
python benchmarks/distillation.py PART...  prints only
"""

from __future__ import annotations

import sys

import coupled
import elastic
import throughput
from results import save

PARTS = {"throughput": throughput.figures, "coupled": coupled.figures, "elastic": elastic.figures}


def main() -> None:
    """Run the parts named, or all."""
    figures: dict[str, float] = {}
    for part in sys.argv[1:] or PARTS:
        print(part, flush=True)
        figures |= PARTS[part]()
    if not sys.argv[1:]:
        print("Written to", save("distillation", {name: round(value, 5) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
