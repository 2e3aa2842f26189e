"""Tables 10 to 12 and figures 5 to 7: what the search chooses at a speed-up, and what others would. No training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.paper.common import SPEEDUPS, Budget, Children, Measured, ordering, table
from puzzle_nas.errors import InfeasibleError
from puzzle_nas.specs import GatedFFN

FRONTIER = (1.1, 1.25, 1.5, 1.75, 2.0, 2.3)


def against(
    children: Children, ours: str, others: Mapping[str, str], speedups: Sequence[float] = SPEEDUPS
) -> dict[str, dict[str, float]]:
    """KL of the search's choice under `ours`, and of baselines at equal predicted speed, by speed-up."""
    columns = {}
    for speedup in speedups:
        rows = columns[f"{speedup}x"] = {ours: children.kl_nats(children.chosen(speedup))}
        for row, baseline in others.items():
            try:
                rows[row] = children.kl_nats(children.chosen(speedup, baseline=baseline))
            except InfeasibleError as error:
                print(f"{row} at {speedup}x: {error}")
    return columns


def baseline_table(name: str, title: str, ours: str, row: str, paper: float, baseline: str) -> None:
    """One of tables 10 to 12."""
    rows = {row: paper, ours: 78.39}

    def measure(budget: Budget) -> Measured:
        columns = against(Children(budget), ours, {row: baseline})
        return Measured(columns, ordering(rows, columns))

    table(name, f"{title}: {row} against {'the ' * (ours != 'MIP')}{ours}", "MMLU", rows, "KL, nats, by speed-up")(
        measure
    )


baseline_table("table_10", "Table 10", "full space", "no-op only", 75.40, "no_op_only")
baseline_table("table_11", "Table 11", "MIP", "greedy", 70.74, "greedy")
baseline_table("table_12", "Table 12", "MIP", "max-params", 23.12, "max_params")


@table(
    "figure_5",
    "Figure 5: quality against speed",
    "accuracy",
    {"full space": "best at every throughput", "no-op only": "", "greedy": ""},
    "KL, nats, by speed-up",
)
def quality_against_speed(budget: Budget) -> Measured:
    """The search's choice at rising speed-ups; the paper's children lose more the faster they are."""
    columns = against(Children(budget), "full space", {"no-op only": "no_op_only", "greedy": "greedy"}, FRONTIER)
    claims = {
        f"{faster} loses more than {slower}": columns[slower]["full space"] < columns[faster]["full space"]
        for slower, faster in itertools.pairwise(columns)
    }
    for column, rows in columns.items():
        claims |= {f"{column}: {row} is worse": rows[row] > rows["full space"] for row in list(rows)[1:]}
    return Measured(columns, claims)


@table(
    "figure_6",
    "Figure 6: which sub-blocks shrink",
    "finding",
    {
        "attention: runtime left": "",
        "attention: layers without": "many",
        "attention: layers linear": "",
        "FFN: runtime left": "",
        "FFN: layers without": "none",
        "FFN: layers linear": "",
        "FFN: layers narrowed": "most",
    },
    "by speed-up, of 30 layers",
)
def which_shrink(budget: Budget) -> Measured:
    """Counts of layers, and runtime left by the cost table as a share of the parent's."""
    children, columns, claims = Children(budget), {}, {}
    costs, parent = children.found.costs, children.found.parent
    for speedup in SPEEDUPS:
        architecture, rows = children.chosen(speedup), {}
        for slot, name in (("attention", "attention"), ("ffn", "FFN")):
            chosen, own = ([block[slot] for block in a.layers] for a in (architecture, parent))
            pairs = list(zip(chosen, own, strict=True))
            kinds = Counter("own" if s == o else "without" if s.empty else s.kind for s, o in pairs)
            left, whole = (
                sum(costs.columns_of(layer, spec)["runtime_ms"] for layer, spec in enumerate(specs))
                for specs in (chosen, own)
            )
            rows[f"{name}: runtime left"] = left / whole
            rows[f"{name}: layers without"] = kinds["without"]
            rows[f"{name}: layers linear"] = kinds["linear"]
            if slot == "ffn":
                rows[f"{name}: layers narrowed"] = kinds[GatedFFN.kind]
        columns[f"{speedup}x"] = rows
        gone = {n: rows[f"{n}: layers without"] + rows[f"{n}: layers linear"] for n in ("attention", "FFN")}
        claims |= {
            f"{speedup}x: softmax attention goes from more layers than gated FFNs": gone["attention"] > gone["FFN"],
            f"{speedup}x: no FFN vanishes": rows["FFN: layers without"] == 0,
            f"{speedup}x: attention loses a larger share of its runtime": rows["attention: runtime left"]
            < rows["FFN: runtime left"],
        }
    return Measured(columns, claims)


@table(
    "figure_7",
    "Figure 7: KL against LM loss as score",
    "accuracy",
    {"KL": "better along the frontier", "LM loss": ""},
    "KL, nats, by speed-up",
)
def kl_against_lm_loss(budget: Budget) -> Measured:
    """Validation KL of what the search takes by either score, and what the sum of its KL scores made of it."""
    children = Children(budget)
    columns, real_over_sum = {}, []
    for speedup in FRONTIER:
        chosen = {"KL": children.chosen(speedup), "LM loss": children.chosen(speedup, children.by_lm_loss)}
        columns[f"{speedup}x"] = {row: children.kl_nats(child) for row, child in chosen.items()}
        ratios = [children.kl_nats(child) / children.found.score_of(child) for child in chosen.values()]
        real_over_sum.append(f"{speedup}x {ratios[0]:.2f} and {ratios[1]:.2f}")
    remark = (
        "Real KL over the sum of KL scores, of KL's child and of LM loss's: "
        f"{', '.join(real_over_sum)}. Where the second is less, its blocks harm less together than each alone."
    )
    return Measured(columns, ordering({"LM loss": 0, "KL": 1}, columns), remark)
