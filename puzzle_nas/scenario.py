"""Traffic that a child is measured with. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """Traffic that the child must serve: one batch of requests of equal shape.

    The first of `decode_tokens` comes out of the prefill; the others take one decode step each.
    """

    name: str
    batch_size: int
    prefill_tokens: int
    decode_tokens: int
    weight: float = 1.0

    @property
    def decode_steps(self) -> int:
        """Forward passes after the prefill."""
        return self.decode_tokens - 1

    @property
    def total_tokens(self) -> int:
        """Tokens in the KV cache of one sequence when the last token has come out."""
        return self.prefill_tokens + self.decode_tokens
