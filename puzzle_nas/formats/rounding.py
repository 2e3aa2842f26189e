"""Rounding in closed form: which codes and scales of a format change a matrix's outputs least.

For a matrix W with inputs x, rounding to Q costs sum |(W - Q) x|^2 = sum over rows of (w - q)' H (w - q), with the
Gram matrix H = sum x x' of calibration tokens. Rows do not depend on each other. From cheap to good:

- `Format.nearest`: each weight by itself.
- `scale_search`: scales that minimise the error with H's diagonal alone.
- `error_feedback`: column by column, what rounding one column did to the outputs is undone by those still to be
  rounded (GPTQ: Frantar et al. 2022, arXiv:2210.17323, with Cholesky factors of the inverse of H).
- `descend`: afterwards each code by itself and each step, given all others, to its optimum.

Shapes: O outputs, I inputs, G groups of columns with a step of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from puzzle_nas.formats.base import Format, Grid, GridFormat, Rounded, inverse

SHRINKS = tuple(1.05 - 0.07 * i for i in range(8))
"""Scales that are tried, relative to the one that just reaches a group's largest weight."""
RIDGE = 0.01
"""What `round_matrix` adds to the Gram matrix's diagonal, relative to its mean."""
EIGHT_BITS = 127
"""The largest code of formats whose errors are small enough without more than a scale search."""
BLOCK_COLUMNS = 64
"""Columns that are rounded before what they did reaches the columns behind them."""
WEIGHTS_AT_ONCE = 1 << 17
"""Weights whose scales are searched together: what is computed on the way stays in a core's cache."""
LARGEST = 1 << 24
"""Weights of one matrix that are rounded together: what is computed on the way takes forty bytes for each."""


def round_matrix(form: Format, weight_OI: torch.Tensor, gram_II: torch.Tensor | None = None) -> Rounded:
    """Round by the best method there is (benchmarks/rounding.py): `error_feedback`, then `descend`.

    With codes of eight bits `scale_search` alone: errors are small already.

    No row has a larger error than by `Format.nearest`, in the norm of the damped Gram matrix.

    Args:
        gram_II: sum of x x' over inputs x of the matrix; None means that all inputs are alike and independent.

    Raises:
        FormatError: rows do not divide into blocks, or weights are too large.
    """
    if not isinstance(form, GridFormat):
        return form.nearest(weight_OI)
    if weight_OI.numel() > LARGEST:
        # Heads, mostly. Rows do not depend on each other.
        rows = weight_OI.split(max(1, LARGEST // weight_OI.shape[1]))
        return Rounded.joined([round_matrix(form, part, gram_II) for part in rows])
    if gram_II is None:
        return scale_search(form, weight_OI, torch.ones_like(weight_OI[0]))
    gram = damped(gram_II, RIDGE)
    searched = scale_search(form, weight_OI, gram.diagonal())
    if form.highest >= EIGHT_BITS:
        return better_rows(weight_OI, gram, searched, form.nearest(weight_OI))
    fed_back = error_feedback(form, weight_OI, gram, searched.grid)
    start = better_rows(weight_OI, gram, fed_back, searched, form.nearest(weight_OI))
    return descend(form, weight_OI, gram, start)


def damped(gram_II: torch.Tensor, ridge: float) -> torch.Tensor:
    """`gram_II` in float64 with a ridge relative to its mean diagonal (and a floor, where there is no data)."""
    gram = gram_II.double()
    mean = gram.diagonal().mean().clamp_min(1e-30)
    return gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def row_errors(weight_OI: torch.Tensor, rounded: Rounded, gram_II: torch.Tensor) -> torch.Tensor:
    """(w - q)' H (w - q) of each row, float64 [O]."""
    error = weight_OI.float() - rounded.dequantised()
    return ((error @ gram_II.float()) * error).double().sum(1)


# Scales


def _least_squares(form: GridFormat, w, codes, importance) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset [O, G] that bring step * code + offset nearest to w, by weighted squares."""
    hq = importance * codes
    qq, qw = (hq * codes).sum(2), (hq * w).sum(2)
    without = qw * inverse(qq)
    if not form.has_offset:
        return without, torch.zeros_like(qw)
    h, q, hw = importance.expand_as(w).sum(2), hq.sum(2), (importance * w).sum(2)
    determinant = h * qq - q * q
    solvable = determinant > 1e-6 * h * qq
    step = torch.where(solvable, (h * qw - q * hw) / torch.where(solvable, determinant, 1), 0)
    offset = (hw - step * q) * inverse(h)
    allowed = offset <= form.largest_offset
    return torch.where(allowed, step, without), torch.where(allowed, offset, 0)


def _candidates(form: GridFormat, w: torch.Tensor):
    """Steps and offsets [O, G] to begin with."""
    if form.has_offset:
        low, high = w.amin(2).clamp_max(form.largest_offset), w.amax(2)
        for shrink in SHRINKS:
            yield (high - low) * shrink / form.highest, low * shrink
            yield (high - low) * shrink / form.highest, low
        return
    peak = w.gather(2, w.abs().argmax(2, keepdim=True)).squeeze(2)
    for shrink in SHRINKS:
        if form.signed_step:
            yield peak * shrink / form.lowest, torch.zeros_like(peak)
            yield peak * shrink / form.highest, torch.zeros_like(peak)
        else:
            yield peak.abs() * shrink / form.highest, torch.zeros_like(peak)


def _codes(form: GridFormat, w, step, offset):
    return form.snap_((w - offset.unsqueeze(2)) * inverse(step).unsqueeze(2))


def _unit_errors(form: GridFormat, weight_OI, rounded: Rounded, importance_I) -> torch.Tensor:
    error = (weight_OI.float() - rounded.dequantised()).square_() * importance_I
    return error.unflatten(1, (form.units(error.shape[1]), -1)).sum(2)


def scale_search(form: GridFormat, weight_OI: torch.Tensor, importance_I: torch.Tensor) -> Rounded:
    """Round with the scales that minimise the weighted squared error of each block, as far as tried.

    Each of `SHRINKS` gives codes, these give scales by least squares, these again codes. No block becomes worse than by
    `Format.nearest`.

    Args:
        importance_I: how much an error in each column costs; the diagonal of the damped Gram matrix.
    """
    threads, inferring = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if weight_OI.device.type != "cpu":
        return _searched(form, weight_OI, importance_I)

    def part(rows: torch.Tensor) -> Rounded:
        with torch.inference_mode(inferring):
            return _searched(form, rows, importance_I)

    with one_thread(), ThreadPoolExecutor(threads) as pool:
        return Rounded.joined(list(pool.map(part, weight_OI.split(max(1, WEIGHTS_AT_ONCE // weight_OI.shape[1])))))


@contextmanager
def one_thread() -> Iterator[None]:
    """For each of many small steps: threads that wait for each other at every step take longer than one alone does, and
    on a busy machine a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _searched(form: GridFormat, weight_OI: torch.Tensor, importance_I: torch.Tensor) -> Rounded:
    w = form.groups(weight_OI)
    importance_I = importance_I.float() / importance_I.mean().clamp_min(1e-30)
    importance = importance_I.unflatten(0, w.shape[1:]).unsqueeze(0)
    best_error = torch.full(w.shape[:2], torch.inf, device=w.device)
    best_step, best_offset = torch.zeros_like(best_error), torch.zeros_like(best_error)
    for step, offset in _candidates(form, w):
        step, offset = _least_squares(form, w, _codes(form, w, step, offset), importance)
        step = form.storable(step)
        values = _codes(form, w, step, offset).mul_(step.unsqueeze(2)).add_(offset.unsqueeze(2))
        error = ((values - w).square_() * importance).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
    grid = form.grid(best_step, best_offset if form.has_offset else None)
    found, nearest = Rounded(form.codes(weight_OI, grid), grid), form.nearest(weight_OI)
    errors = [_unit_errors(form, weight_OI, rounded, importance_I) for rounded in (found, nearest)]
    return _chosen(found, nearest, errors[0] <= errors[1])


def _chosen(first: Rounded, second: Rounded, first_OU: torch.Tensor) -> Rounded:
    """The first where `first_OU` is true, unit by unit."""
    columns = first_OU.repeat_interleave(first.codes_OI.shape[1] // first_OU.shape[1], dim=1)
    codes = torch.where(columns, first.codes_OI, second.codes_OI)
    return Rounded(codes, first.grid.chosen(first_OU, second.grid))


# Codes, given scales


def _by_columns(grid: Grid, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights less the offsets, and each one's step, contiguous [I, O]: what loops over columns read."""
    repeat = weight_OI.shape[1] // grid.step_OG.shape[1]
    w_IO = weight_OI.float().T.contiguous()
    if grid.offset_OG is not None:
        w_IO = w_IO - grid.offset_OG.T.repeat_interleave(repeat, dim=0)
    return w_IO, grid.step_OG.T.repeat_interleave(repeat, dim=0)


def _upper_factor_of_inverse(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U' U = gram^-1: its row j says how an error in column j is carried to those behind."""
    # Cholesky of the reversed matrix gives gram = M M' with M upper triangular, and U = M^-1.
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


@one_thread()
def _fed_back(form: GridFormat, w_IO, steps_IO, factor) -> torch.Tensor:
    """Codes, float32 [I, O], of weights that are changed on the way; all in the order in which columns are rounded."""
    inverses_IO, codes_IO = inverse(steps_IO), torch.empty_like(w_IO)
    # By how much an error in one column changes those behind it.
    factor = factor / factor.diagonal()[:, None]
    rows = zip(w_IO, codes_IO, steps_IO, inverses_IO, strict=True)
    for start in range(0, len(w_IO), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(w_IO))
        errors = torch.empty_like(w_IO[start:stop])
        for j, error in zip(range(start, stop), errors, strict=True):
            w, codes, step, one_over_step = next(rows)
            form.snap_(torch.mul(w, one_over_step, out=codes))
            torch.addcmul(w, codes, step, value=-1, out=error)
            w_IO[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        w_IO[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes_IO


def error_feedback(
    form: GridFormat,
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    grid: Grid,
    by_activation: bool = True,
) -> Rounded:
    """Round column by column; later columns undo what earlier ones did to the outputs.

    Args:
        gram_II: sum of x x' over calibration tokens, `damped`.
        grid: the scales, as `scale_search` finds them.
        by_activation: columns with the largest inputs first. Codes stay where they are, so every format allows it.
    """
    columns, gram = weight_OI.shape[1], gram_II.double()
    order = gram.diagonal().argsort(descending=True) if by_activation else torch.arange(columns, device=gram.device)
    factor = _upper_factor_of_inverse(gram[order][:, order]).float()
    codes_IO = _fed_back(form, *(tensor[order] for tensor in _by_columns(grid, weight_OI)), factor)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=order.device)
    return Rounded(codes_IO[back].T.to(torch.int16).contiguous(), grid)


@one_thread()
def _descend_codes(form: GridFormat, weight_OI, gram, rounded: Rounded) -> Rounded:
    """Each code once to its optimum, given all others."""
    w_IO, steps_IO = _by_columns(rounded.grid, weight_OI)
    inverses_IO, codes_IO = inverse(steps_IO), rounded.codes_OI.T.float().contiguous()
    values_IO = codes_IO * steps_IO
    error_IO = w_IO - values_IO
    rows = zip(values_IO, codes_IO, steps_IO, inverses_IO, strict=True)
    for start in range(0, len(w_IO), BLOCK_COLUMNS):
        block = slice(start, min(start + BLOCK_COLUMNS, len(w_IO)))
        scaled = gram[block] / gram.diagonal()[block, None]
        # What each of these columns should be, given all others.
        wanted_IO = torch.addmm(values_IO[block], scaled, error_IO)
        by_this = scaled[:, block].T.contiguous()
        for j, wanted in enumerate(wanted_IO):
            values, codes, step, one_over_step = next(rows)
            form.snap_(torch.mul(wanted, one_over_step, out=codes))
            before = values.clone()
            change = torch.mul(codes, step, out=values) - before
            wanted_IO[j + 1 :].addr_(by_this[j, j + 1 :], change, alpha=-1)
        error_IO[block] = w_IO[block] - values_IO[block]
    return Rounded(codes_IO.T.to(torch.int16).contiguous(), rounded.grid)


def _refit_steps(form: GridFormat, weight_OI, gram, rounded: Rounded) -> Rounded:
    """All steps of each row to their common optimum, given the codes and offsets."""
    grid = rounded.grid
    num_groups = grid.step_OG.shape[1]
    codes = rounded.codes_OI.float()
    target = weight_OI.float()
    if grid.offset_OG is not None:
        target = target - grid.offset_OG.repeat_interleave(target.shape[1] // num_groups, dim=1)
    grouped = codes.unflatten(1, (num_groups, -1))
    right = ((target @ gram).unflatten(1, (num_groups, -1)) * grouped).sum(2)
    left = torch.stack(
        [
            ((grouped[:, g] @ rows).unflatten(1, (num_groups, -1)) * grouped).sum(2)
            for g, rows in enumerate(gram.unflatten(0, (num_groups, -1)))
        ],
        dim=1,
    ).double()
    diagonal = left.diagonal(dim1=1, dim2=2)
    left = left + torch.diag_embed(1e-6 * diagonal + torch.where(diagonal == 0, 1.0, 0.0))
    step = torch.linalg.solve(left, right.double().unsqueeze(2)).squeeze(2).float()
    # A group of zeros has no step of its own; it keeps its old one.
    kept = (diagonal == 0) if form.signed_step else (diagonal == 0) | (step <= 0)
    step = torch.where(kept, grid.step_OG, step)
    return Rounded(rounded.codes_OI, form.grid(step, grid.offset_OG))


def descend(
    form: GridFormat, weight_OI: torch.Tensor, gram_II: torch.Tensor, rounded: Rounded, sweeps: int = 1
) -> Rounded:
    """Coordinate descent from `rounded`: steps, then codes, and again. No row becomes worse.

    Args:
        gram_II: sum of x x' over calibration tokens, `damped`.
    """
    gram = gram_II.float()
    errors = row_errors(weight_OI, rounded, gram)
    for _ in range(sweeps):
        for improve in (_refit_steps, _descend_codes):
            other = improve(form, weight_OI, gram, rounded)
            rounded, errors = _better(weight_OI, gram, rounded, errors, other)
    return rounded


def better_rows(weight_OI: torch.Tensor, gram_II: torch.Tensor, *roundings: Rounded) -> Rounded:
    """Of each row the rounding with the smallest error in the Gram matrix's norm."""
    best, *others = roundings
    errors = row_errors(weight_OI, best, gram_II)
    for other in others:
        best, errors = _better(weight_OI, gram_II, best, errors, other)
    return best


def _better(weight_OI, gram_II, best: Rounded, errors_O: torch.Tensor, other: Rounded) -> tuple[Rounded, torch.Tensor]:
    """Of each row the better rounding, and its error."""
    new = row_errors(weight_OI, other, gram_II)
    return _chosen(other, best, (new < errors_O).unsqueeze(1)), torch.minimum(errors_O, new)
