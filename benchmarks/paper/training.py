"""Table 1: the losses of GKD, all combinations, from one child at 1.5x. Lower KL is better in both columns."""

from __future__ import annotations

from benchmarks.common import linked
from benchmarks.paper.common import KEPT, Budget, Children, Measured, ordering, table
from puzzle_nas.artifacts import read_json, write_json
from puzzle_nas.library import assemble
from puzzle_nas.training.distillation import Training
from puzzle_nas.training.parent_outputs import LiveParent

PAPER = {
    "none": 0.19,
    "LM": 0.31,
    "LM + cosine": 0.30,
    "LM + KLD": 0.14,
    "LM + cosine + KLD": 0.14,
    "cosine": 0.16,
    "KLD": 0.10,
    "cosine + KLD": 0.11,
}
SPEEDUP = 1.5


def distilled_kl(children: Children, row: str) -> float:
    """KL on validation after the last step with these losses; kept."""
    run = linked(children.run, KEPT / f"{children.budget.name}-losses/{row.replace(' ', '')}")
    if (run / "kl.json").exists():
        return read_json(run / "kl.json")["kl_nats"]
    losses, tokens = row.split(" + "), children.budget.gkd_tokens
    weights = {key: 1.0 for key, name in (("lm", "LM"), ("cosine", "cosine"), ("kl", "KLD")) if name in losses}
    gkd = children.recipe.gkd.model_copy(update={"tokens": tokens, "losses": weights})
    start = assemble(children.run, children.parent, children.chosen(SPEEDUP))
    training = Training(children.recipe.model_copy(update={"gkd": gkd}), run, LiveParent(children.parent), start)
    training.train()
    kl = children.validation.compare(training.finish().eval()).kl_nats
    write_json(run / "kl.json", {"kl_nats": kl, "tokens": tokens})
    return kl


@table("table_01", "Table 1: losses of GKD", "validation KLD", PAPER, "KL, nats")
def losses(budget: Budget) -> Measured:
    """One short distillation for each row."""
    children, rows = Children(budget), {}
    for row in PAPER:
        rows[row] = children.kl_nats(children.chosen(SPEEDUP)) if row == "none" else distilled_kl(children, row)
        print(f"{row:20s} {rows[row]:.4f}", flush=True)
    columns = {f"{budget.gkd_tokens} tokens": rows}
    remark = (
        f"The paper's child starts {PAPER['none']} nats from its parent, and LM loss drives it away; ours starts "
        f"{rows['none']:.2f} nats away, so far that any training on the text brings it nearer."
    )
    return Measured(columns, ordering(PAPER, columns, paper_lower_is_better=True), remark)
