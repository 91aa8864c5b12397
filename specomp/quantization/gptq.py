"""GPTQ (arXiv:2210.17323): round column by column, and let the columns still to come make up for
each rounding error.

Minimizes ||(Q - W) X||_F greedily; needs the Gram X X^T alone (the paper's Hessian is twice it:
only ratios matter). Shapes: W (m, n), gram (n, n). Checked against gptqmodel:
experiments/benchmarks/gptq_reference.py. Differs from the published code: with act-order, groups
keep the grid of the weights as they were (their columns are not consecutive in the order of
rounding; compressed-tensors calls it static); scales are rounded to the 16 bits they are stored in.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from specomp.numerics.grid import Grid, limits
from specomp.numerics.linalg import SOLVE_DTYPE, cholesky_damped
from specomp.quantization.rtn import OnGrid, Spacing

BLOCK_COLUMNS = 128
# What the rows of all grids that are swept side by side take at most; one grid may take more.
SWEPT_BYTES = 2**28
# Where the asked damping is not enough, it is raised by tens from the first of these, up to the
# second.
START_DAMPING, MAX_DAMPING = 1e-6, 1.0


def gptq(
    weight: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    spacing: Spacing,
    *,
    act_order: bool,
    damping: float,
) -> OnGrid:
    """Integers and grid of a weight whose inputs have this Gram; equals round to nearest for a
    diagonal Gram and grids that stay.

    act_order: the columns of the largest inputs first. damping: of the mean diagonal. Raises
    ValueError when the Gram is not finite.
    """
    return gptq_each(weight, gram, [spacing], act_order=act_order, damping=damping)[0]


def gptq_each(
    weight: Float[Tensor, "m n"],
    gram: Float[Tensor, "n n"],
    spacings: Sequence[Spacing],
    *,
    act_order: bool,
    damping: float,
) -> list[OnGrid]:
    """The same on each of several grids, in one sweep where their grids stay: rows do not know of
    each other.
    """
    n = weight.shape[1]
    gram = gram.to(SOLVE_DTYPE).clone()
    dead = gram.diagonal() <= 0
    gram.diagonal()[dead] = gram.diagonal().mean() if not dead.all() else 1.0
    # of inputs that never occur, as the published code does
    weight = weight.float().masked_fill(dead, 0.0)
    order = (
        gram.diagonal().argsort(descending=True, stable=True)
        if act_order
        else torch.arange(n, device=gram.device)
    )
    feedback, used = inverse_factor(gram[order][:, order], damping)
    feedback = feedback.float()
    rows = weight.T[order].contiguous()  # (n, m): a column of the weight is a row here, contiguous
    energy = gram.diagonal().float()
    grids = [spacing.fit(weight, energy) for spacing in spacings]
    if not act_order and any(x.group_size < n for x in grids):
        found = [
            _refitting(rows.clone(), feedback, x, s, energy)
            for x, s in zip(grids, spacings, strict=True)
        ]
    else:
        at_once = max(1, SWEPT_BYTES // (4 * rows.numel()))
        integers = [
            x
            for i in range(0, len(grids), at_once)
            for x in _sweep(rows, feedback, grids[i : i + at_once], order)
        ]
        found = list(zip(integers, grids, strict=True))
    back = order.argsort()
    return [OnGrid(integers[back].T.contiguous(), grid, used) for integers, grid in found]


def _sweep(
    rows: Float[Tensor, "n m"], feedback: Float[Tensor, "n n"], grids: Sequence[Grid], order: Tensor
) -> list[Int8[Tensor, "n m"]]:
    """Integers on grids that stay, of all of them side by side."""
    n, m = rows.shape
    each = [_by_group(x) for x in grids]
    bounds = torch.tensor([limits(x.bits) for x in grids], dtype=rows.dtype, device=rows.device)
    low, high = bounds.repeat_interleave(m, 0).T
    rows = rows.repeat(1, len(grids))
    integers = torch.empty_like(rows, dtype=torch.int8)
    columns = order.tolist()
    for start in range(0, n, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, n)
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            at = [columns[j] // x.group_size for x in grids]
            scales = torch.cat([s[i] for (s, _), i in zip(each, at, strict=True)])
            zeros = torch.cat([z[i] for (_, z), i in zip(each, at, strict=True)])
            q = (rows[j] / scales + zeros).round().clamp(low, high)
            integers[j] = q.to(torch.int8)
            errors[j - start] = _fed_back(rows, feedback, j, stop, (q - zeros) * scales)
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    return list(integers.split(m, 1))


def _fed_back(rows: Tensor, feedback: Tensor, j: int, stop: int, stored: Tensor) -> Tensor:
    """The error of storing column j so, which the columns up to `stop` make up for."""
    error = (rows[j] - stored) / feedback[j, j]
    rows[j + 1 : stop].addr_(feedback[j, j + 1 : stop], error, alpha=-1)
    return error


def _refitting(
    rows: Float[Tensor, "n m"],
    feedback: Float[Tensor, "n n"],
    grid: Grid,
    spacing: Spacing,
    energy: Float[Tensor, " n"],
) -> tuple[Int8[Tensor, "n m"], Grid]:
    """Integers on a grid whose every group spans what its columns have become; rows in the order of
    the columns.
    """
    n, block = len(rows), grid.group_size
    (low, high), integers = limits(grid.bits), torch.empty_like(rows, dtype=torch.int8)
    grids = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        grids.append(spacing.fit(rows[start:stop].T, energy[start:stop]))
        ((scales,), (zeros,)) = _by_group(grids[-1])
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            q = (rows[j] / scales + zeros).round().clamp(low, high)
            integers[j] = q.to(torch.int8)
            errors[j - start] = _fed_back(rows, feedback, j, stop, (q - zeros) * scales)
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    zeros = [x.zeros for x in grids if x.zeros is not None]
    together = torch.cat(zeros, dim=1) if zeros else None
    return integers, replace(
        grid, scales=torch.cat([x.scales for x in grids], dim=1), zeros=together
    )


def inverse_factor(
    gram: Float[Tensor, "n n"], damping: float
) -> tuple[Float[Tensor, "n n"], float]:
    """Upper triangular F (n, n) with F^T F = (gram + damping mean(diag gram) I)^-1, and the damping
    that was needed.

    One Cholesky factorization from the last row up and one triangular inverse: equals
    torch.linalg.cholesky(inv(gram), upper=True).
    """
    unit = gram.diagonal().mean()
    damped = gram.flip(0, 1)
    damped.diagonal().add_(damping * unit)
    lower, more = cholesky_damped(damped, damping or START_DAMPING, MAX_DAMPING)
    identity = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping + more * (
        1 + damping
    )


def _by_group(grid: Grid) -> tuple[Float[Tensor, "groups m"], Float[Tensor, "groups m"]]:
    """Scales and zeros as float32."""
    scales = grid.scales.T.float().contiguous()
    return scales, torch.zeros_like(
        scales
    ) if grid.zeros is None else grid.zeros.T.float().contiguous()
