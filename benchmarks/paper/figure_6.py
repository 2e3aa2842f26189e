"""Puzzle, figure 6: what is left of each layer's attention and FFN. Needs no training and no forward pass."""

from collections import Counter

from benchmarks.paper.common import SPEEDUPS, Budget, Children, Measured, Table
from puzzle_nas.architecture import GatedFFN

PAPER = {
    "attention: runtime left": "",
    "attention: layers without": "many",
    "attention: layers linear": "",
    "FFN: runtime left": "",
    "FFN: layers without": "none",
    "FFN: layers linear": "",
    "FFN: layers narrowed": "most",
}


def measure(budget: Budget) -> Measured:
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


TABLE = Table("figure_6", "Figure 6: which sub-blocks shrink", "finding", PAPER, "by speed-up, of 30 layers", measure)

if __name__ == "__main__":
    TABLE.main()
