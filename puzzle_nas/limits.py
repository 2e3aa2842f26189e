"""The limits that a user can set, by name; what each bounds in a cost table, costs.py says. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from puzzle_nas.errors import RecipeError

LIMITS = {
    "speedup": "at least this many times the parent's speed on the mix of scenarios",
    "throughput_tokens_per_second": "at least this many generated tokens per second",
    "latency_ms": "at most this long for a whole request batch",
    "time_to_first_token_ms": "at most this long for the prompts of a request batch",
    "time_per_output_token_ms": "at most this long for each further token of a request batch",
    "memory_bytes": "at most this much for parameters, the full KV cache and working space",
    "parameters": "at most this many",
}
"""The last two and `speedup` hold for the child; the others in every scenario, or in the one named after an @, or,
after @mix, on the weighted mean."""
LIMITED_TIMES = {
    "throughput_tokens_per_second": "runtime_ms",
    "latency_ms": "runtime_ms",
    "time_to_first_token_ms": "prefill_ms",
    "time_per_output_token_ms": "decode_step_ms",
}
"""The cost that each limit on times bounds."""
MIX = "mix"


def check_limit(name: str, value: float, scenarios: Iterable[str]) -> None:
    """See that a limit means something.

    Raises:
        RecipeError: a limit or scenario that is not known, or a value that is not positive.
    """
    quantity, _, place = name.partition("@")
    if quantity not in LIMITS:
        raise RecipeError(f"'{name}' is not a limit{did_you_mean(quantity, LIMITS)}")
    if not value > 0:
        raise RecipeError(f"The limit {name}={value:g} must be positive.")
    if place and quantity not in LIMITED_TIMES:
        raise RecipeError(f"The limit {quantity} holds for all scenarios together; leave out @{place}.")
    places = [*scenarios, MIX]
    if place and place not in places:
        raise RecipeError(f"'{name}': there is no scenario {place}{did_you_mean(place, places)}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence: the name that was probably meant, or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(given, known, n=1)
    return f". Did you mean {close[0]}?" if close else f"; known: {', '.join(known)}."
