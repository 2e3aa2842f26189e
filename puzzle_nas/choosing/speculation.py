"""Speculative decoding as arithmetic: a draft proposes tokens, the parent checks them in one pass. No torch.

The draft writes k tokens; the parent's pass over these, and the token before them, gives its own choice after each, so
that what comes out is exactly the parent's: the drafts up to the first that it would not have written, and one token of
its own (Leviathan et al., 2023, arXiv 2211.17192). Times are in decode steps of the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

MOST_DRAFTS = 16
"""As many drafts a pass as are tried."""

Verification: TypeAlias = Callable[[int], float]
"""Time of a parent's pass over so many drafts and the token before them; 1 without drafts."""


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens for each pass of the parent, (1 - a^(k + 1)) / (1 - a) (Leviathan et al., equation 1).

    Args:
        acceptance: share of the drafts that the parent accepts where it accepted all earlier ones, taken as the same at
            every place.
        drafts: how many the draft writes for each pass.
    """
    return float(sum(acceptance**accepted for accepted in range(drafts + 1)))


def speedup(acceptance: float, cost_ratio: float, drafts: int, verification: Verification) -> float:
    """How many times as many tokens in the same time as the parent writes alone, one by one.

    Args:
        cost_ratio: time of a decode step of the draft, in those of the parent.
    """
    return expected_tokens(acceptance, drafts) / (drafts * cost_ratio + verification(drafts))


@dataclass(frozen=True)
class Speculation:
    """The best number of drafts for each pass, and what it gives."""

    drafts: int
    speedup: float


def best_speculation(acceptance: float, cost_ratio: float, verification: Verification) -> Speculation:
    """All numbers of drafts tried, from 1 to MOST_DRAFTS; of equals the fewest."""
    tried = [Speculation(k, speedup(acceptance, cost_ratio, k, verification)) for k in range(1, MOST_DRAFTS + 1)]
    return max(tried, key=lambda found: found.speedup)


def break_even_cost_ratio(acceptance: float, verification: Verification, prompt: float = 0.0) -> float:
    """Below which cost ratio a draft makes its parent faster; 0 or less: not even one that takes no time does.

    Args:
        prompt: time of the parent's pass over the prompt, over that of its decode steps. The draft reads it too,
            in as much less time as it takes for a decode step.
    """

    def at(drafts: int) -> float:
        tokens = expected_tokens(acceptance, drafts)
        return (tokens - verification(drafts)) / (drafts + prompt * tokens)

    return max(map(at, range(1, MOST_DRAFTS + 1)))
