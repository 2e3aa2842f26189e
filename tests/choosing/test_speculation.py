"""The arithmetic of speculative decoding against what it stands for: drafts written, checked and counted."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_nas.choosing.speculation import (
    MOST_DRAFTS,
    best_speculation,
    break_even_cost_ratio,
    expected_tokens,
    speedup,
)

shares = st.floats(0, 1)
ratios = st.floats(0.01, 2)
per_token = st.floats(0, 1.2)


def linear(slope):
    return lambda drafts: 1 + slope * drafts


@given(shares, st.integers(1, 6))
def test_expected_tokens_are_the_mean_over_every_outcome(acceptance, drafts):
    mean = 0.0
    for accepted in itertools.product((True, False), repeat=drafts):
        chance = 1.0
        for is_accepted in accepted:
            chance *= acceptance if is_accepted else 1 - acceptance
        mean += chance * (1 + sum(1 for _ in itertools.takewhile(bool, accepted)))
    assert expected_tokens(acceptance, drafts) == pytest.approx(mean)
    if acceptance < 0.999:
        assert expected_tokens(acceptance, drafts) == pytest.approx((1 - acceptance ** (drafts + 1)) / (1 - acceptance))


@pytest.mark.parametrize("acceptance", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_speedup_is_that_of_a_decoder_that_is_timed(acceptance, drafts):
    """Tokens are written until there are many; the clock counts every step of the draft and pass of the parent."""
    draw, slope, cost_ratio = random.Random(0), 0.1, 0.3
    written, clock = 0, 0.0
    while written < 100_000:
        accepted = sum(1 for _ in itertools.takewhile(lambda _: draw.random() < acceptance, range(drafts)))
        written += accepted + 1
        clock += drafts * cost_ratio + 1 + slope * drafts
    assert speedup(acceptance, cost_ratio, drafts, linear(slope)) == pytest.approx(written / clock, rel=0.02)


@given(shares, ratios, per_token)
def test_no_number_of_drafts_is_better_than_the_best(acceptance, cost_ratio, slope):
    best = best_speculation(acceptance, cost_ratio, linear(slope))
    every = {k: speedup(acceptance, cost_ratio, k, linear(slope)) for k in range(1, MOST_DRAFTS + 1)}
    assert best.speedup == max(every.values()) == every[best.drafts]
    assert best.drafts == min(k for k, value in every.items() if value == best.speedup)


@settings(max_examples=300)
@given(shares, ratios, per_token)
def test_a_draft_pays_below_the_break_even_ratio_and_only_there(acceptance, cost_ratio, slope):
    limit = break_even_cost_ratio(acceptance, linear(slope))
    found = best_speculation(acceptance, cost_ratio, linear(slope)).speedup
    if abs(cost_ratio - limit) > 1e-6:
        assert (found > 1) == (cost_ratio < limit)
    if limit > 1e-6:
        assert best_speculation(acceptance, limit, linear(slope)).speedup == pytest.approx(1)


@given(shares, st.floats(0, 0.5), st.floats(0, 4))
def test_a_draft_that_reads_the_prompt_too_breaks_even_at_less(acceptance, slope, prompt):
    """A request of one prompt and so many decode steps that they take one unit of time, alone and with the draft."""
    limit = break_even_cost_ratio(acceptance, linear(slope), prompt)
    if limit > 1e-6:
        best = best_speculation(acceptance, limit, linear(slope)).speedup
        assert prompt + 1 == pytest.approx(prompt + limit * prompt + 1 / best)
    assert limit <= break_even_cost_ratio(acceptance, linear(slope)) or limit < 0


def test_passes_that_cost_as_much_as_their_tokens_never_pay():
    """A processor that is busy with one token gains nothing from several at once."""
    assert break_even_cost_ratio(1.0, linear(1.0)) == pytest.approx(0)
    assert break_even_cost_ratio(0.9, linear(1.0)) < 0
    # As in the paper, where a pass over several takes no longer than over one, any draft that is cheap enough pays.
    assert break_even_cost_ratio(0.3, linear(0.0)) == pytest.approx(0.3)
