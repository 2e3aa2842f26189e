"""How much a search does, by the words of `search.effort`, and what is the same for all of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GAP = 1e-4
"""Relative optimality gap at which the solver may stop."""
TIME_LIMIT_SECONDS = 60.0
"""Longest time for one solve."""
MIN_DIFFERENT = 8
"""Positions in which several solutions of the same sums differ from each other."""
SPEED_ATTEMPTS = 3
"""How often the found architecture is timed next to the parent and, where its measured speed-up falls short of the
limit or is far beyond it, searched again with a tighter or looser one."""


@dataclass(frozen=True)
class Effort:
    """Which children are assembled, refitted and measured on the selection split; the best of them counts."""

    by_sums: int = 1
    """So many of the best sums of scores, in turn of KL, of LM loss, and of both; 1 alone needs no measuring."""
    removed_runs: int = 0
    """So many more that lack a run of whole layers, worth more than scores of single blocks say: as many layers as
    would be enough alone, in the format in which that is fewest, then half as many, and so on; the rest by sums of
    scores."""
    refine_rounds: int = 0
    """Around so many of those children scores are taken again, and the search repeated near them: the best by sums and
    those that lack a run, whichever are ahead. A round takes as long as all scores."""

    @property
    def measures_children(self) -> bool:
        """Whether children are assembled to choose among them."""
        return self != Effort()


EFFORTS: Mapping[str, Effort] = MappingProxyType(
    {
        "fast": Effort(),
        "normal": Effort(by_sums=3, removed_runs=2, refine_rounds=1),
        "thorough": Effort(by_sums=3, removed_runs=3, refine_rounds=2),
    }
)
"""What each word means. Scores taken again gain most far from the parent (docs/results.md, sums of scores)."""


def explained_efforts() -> str:
    """The words and their numbers, for the setting's documentation."""
    lines = [
        "How much the search does for a better child.",
    ]
    for word, effort in EFFORTS.items():
        if not effort.measures_children:
            lines.append(f"`{word}`: the child with the best sum of scores; no other is assembled.")
            continue
        by_sums, runs, rounds = effort.by_sums, effort.removed_runs, effort.refine_rounds
        again = "once, around the best" if rounds == 1 else f"around {rounds} of the best"
        lines += [
            f"`{word}`: {by_sums} children with the best sums and {runs} without a run of layers are assembled and",
            f"measured. Scores are taken again {again}, each time for as long as all scores took.",
        ]
    lines += [
        "If a speed-up is a limit, the found child is also timed next to the parent, and the limit corrected, unless",
        "the costs are from `costs.file`.",
    ]
    return "\n".join(lines)
