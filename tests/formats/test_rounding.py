"""Closed-form rounding: never worse than to nearest in the norm that it minimises, and as good as brute force."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle_nas.formats import rounding
from puzzle_nas.formats.registry import FORMATS
from puzzle_nas.formats.rounding import (
    damped,
    descend,
    error_feedback,
    round_matrix,
    row_errors,
    scale_search,
)

GRIDS = [name for name in FORMATS if name not in ("bf16", "f16")]
FEW = ["q8_0", "q4_k", "q6_k", "int4"]
"""One of each kind of grid."""
RIDGE = 0.01


def problem(seed, outputs=6, inputs=256):
    """(weight, Gram matrix of correlated inputs)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).pow(3)
    x = torch.randn(3 * inputs, inputs, generator=generator) @ mixing
    return torch.randn(outputs, inputs, generator=generator), (x.T @ x).double()


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31))
def test_no_block_is_worse_than_by_nearest(name, seed):
    form = FORMATS[name]
    w, gram = problem(seed)
    importance = gram.diagonal().float()

    def errors(rounded):
        error = (rounded.dequantised() - w).square() * importance
        return error.unflatten(1, (form.units(w.shape[1]), -1)).sum(2)

    found, nearest = errors(scale_search(form, w, importance)), errors(form.nearest(w))
    assert (found <= nearest * (1 + 1e-5)).all()
    assert found.sum() < nearest.sum()


@pytest.mark.parametrize("name", FEW)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31))
def test_descent_makes_no_row_worse(name, seed):
    form = FORMATS[name]
    w, gram = problem(seed)
    start = form.nearest(w)
    fallen = descend(form, w, gram, start)
    assert (row_errors(w, fallen, gram) <= row_errors(w, start, gram) * (1 + 1e-5)).all()
    assert row_errors(w, fallen, gram).sum() < 0.95 * row_errors(w, start, gram).sum()


@pytest.mark.parametrize("name", FEW)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31), st.sampled_from([1, 40, 256]))
def test_no_row_is_worse_than_by_nearest(name, seed, rank):
    w, gram = problem(seed)
    values, vectors = torch.linalg.eigh(gram)
    norm = damped((vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T, RIDGE)
    nearest = row_errors(w, FORMATS[name].nearest(w), norm)
    assert (row_errors(w, round_matrix(FORMATS[name], w, norm), norm) <= nearest * (1 + 1e-3)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_each_method_beats_the_one_before(name):
    form = FORMATS[name]
    w, gram = problem(1, outputs=16)
    gram = damped(gram, RIDGE)
    searched = scale_search(form, w, gram.diagonal())
    fed_back = error_feedback(form, w, gram, searched.grid)
    fallen = descend(form, w, gram, fed_back)
    errors = [row_errors(w, rounded, gram).sum() for rounded in (form.nearest(w), searched, fed_back, fallen)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]
    best = row_errors(w, round_matrix(form, w, gram), gram).sum()
    # With eight bits the scale search is enough.
    assert best <= 1.01 * errors[1] if form.highest >= 127 else best < errors[1]


def test_error_feedback_is_gptq_as_published():
    """Column by column with the inverse of the Gram matrix of what is left, as in the paper's equation 2."""
    form = FORMATS["q4_0"]
    w, gram = problem(2, outputs=3, inputs=96)
    grid = form.nearest(w).grid
    left = w.double().clone()
    gram = damped(gram, RIDGE)
    expected = torch.zeros_like(left)
    for j in range(96):
        inverse = torch.linalg.inv(gram[j:, j:])
        column = torch.zeros(3, 96)
        column[:, j] = left[:, j].float()
        step = grid.step_OG[:, j // 32]
        expected[:, j] = form.codes(column, grid)[:, j] * step
        left[:, j:] -= ((left[:, j] - expected[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    ours = error_feedback(form, w, gram, grid, by_activation=False).dequantised()
    torch.testing.assert_close(ours, expected.float())


def test_descent_finds_the_best_codes_of_a_small_problem():
    """Two columns matter; with scales kept, brute force over their codes."""
    form = FORMATS["q4_0"]
    w, _ = problem(3, outputs=1, inputs=32)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.3], [0.0, 0.2]])
    gram = torch.zeros(32, 32, dtype=torch.double)
    gram[:2, :2] = (x.T @ x).double()
    start = form.nearest(w)
    values = start.dequantised()
    step = start.grid.step_OG[0, 0]
    costs = []
    for first, second in itertools.product(range(-8, 8), repeat=2):
        values[0, 0], values[0, 1] = first * step, second * step
        error = (w - values).double()
        costs.append((error @ gram @ error.T).item())
    assert row_errors(w, descend(form, w, damped(gram, 1e-9), start, sweeps=4), gram).item() <= min(costs) * (1 + 1e-6)


@pytest.mark.parametrize("name", FEW)
def test_columns_without_inputs_do_no_harm(name):
    w, gram = problem(4, outputs=2)
    gram[:, 40:90] = 0
    gram[40:90] = 0
    rounded = round_matrix(FORMATS[name], w, gram)
    assert torch.isfinite(rounded.dequantised()).all()
    assert row_errors(w, rounded, gram).sum() < row_errors(w, FORMATS[name].nearest(w), gram).sum()


@pytest.mark.parametrize("name", FEW)
def test_a_matrix_of_zeros_stays_zero(name):
    w, gram = torch.zeros(2, 256), problem(5)[1]
    rounded = round_matrix(FORMATS[name], w, gram)
    assert not rounded.dequantised().any()


def test_without_a_gram_matrix_scales_are_searched_and_floats_are_rounded_to_nearest():
    w, _ = problem(7)
    searched = round_matrix(FORMATS["q4_0"], w).dequantised()
    assert (searched - w).square().sum() < (FORMATS["q4_0"].nearest(w).dequantised() - w).square().sum()
    assert torch.equal(round_matrix(FORMATS["bf16"], w).dequantised(), w.bfloat16().float())


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "mxfp4", "int8"])
def test_large_matrices_are_rounded_some_rows_at_a_time_to_the_same(name, monkeypatch):
    w, gram = problem(3, outputs=11)
    whole = round_matrix(FORMATS[name], w, gram)
    monkeypatch.setattr(rounding, "LARGEST", 4 * 256)
    parts = round_matrix(FORMATS[name], w, gram)
    assert torch.equal(parts.codes_OI, whole.codes_OI)
    torch.testing.assert_close(parts.dequantised(), whole.dequantised())
