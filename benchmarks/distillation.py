"""Distillation: what fraction of the machine is used, memory, processes, and what other ways would give.

Reads runs/torch. Each part adds to benchmarks/results/distillation.json, without AMX to distillation_avx512.json
or distillation_float32.json; `throughput` and `ranks` want a quiet machine. Muon's share of AdamW's tokens comes from
benchmarks/gkd.py, killed runs from benchmarks/faults.py.

python benchmarks/distillation.py [PART...]   throughput, coupled, streaming, ranks; all if none is named
"""

from __future__ import annotations

import json
import sys

import coupled
import ranks
import streaming
import throughput
from results import RESULTS, by_arithmetic, save

PARTS = {
    "throughput": throughput.figures,
    "coupled": coupled.figures,
    "streaming": streaming.figures,
    "ranks": ranks.figures,
}
FROM_GKD = "gkd_tokens_to_same_kl_over_adamw"


def kept(name: str) -> dict[str, float]:
    """The figures of an earlier call, none where there was none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["figures"] if path.is_file() else {}


def main() -> None:
    """Run the parts named, or all."""
    for part in sys.argv[1:] or PARTS:
        print(part, flush=True)
        name = by_arithmetic("distillation")
        figures = kept(name) | {key: round(value, 5) for key, value in PARTS[part]().items()}
        figures |= {key: value for key, value in kept(by_arithmetic("gkd")).items() if key == FROM_GKD}
        print("Written to", save(name, figures))


if __name__ == "__main__":
    main()
