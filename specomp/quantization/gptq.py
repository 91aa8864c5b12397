"""GPTQ (arXiv:2210.17323): round column by column, and let the columns still to come make up for
each rounding error.

Minimizes ||(Q - W) X||_F greedily; needs the Gram X X^T alone (the paper's Hessian is twice it:
only ratios matter). Shapes: W (m, n), gram (n, n). Checked against gptqmodel:
experiments/benchmarks/gptq_reference.py. Differs from the published code: with act-order, groups
keep the grid of the weights as they were (their columns are not consecutive in the order of
rounding; compressed-tensors calls it static); scales are rounded to the 16 bits they are stored in.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from specomp.numerics.grid import Grid, limits
from specomp.numerics.linalg import SOLVE_DTYPE, cholesky_damped
from specomp.quantization.rtn import OnGrid, Spacing

BLOCK_COLUMNS = 128
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

    grid = spacing.fit(weight)
    refitted = not act_order and grid.group_size < n
    block = grid.group_size if refitted else BLOCK_COLUMNS
    (low, high), integers, grids = limits(grid.bits), torch.empty_like(rows, dtype=torch.int8), []
    scales, zeros = _by_group(grid)
    for start in range(0, n, block):
        stop = min(start + block, n)
        if refitted:  # a group's grid spans what its columns have become
            grids.append(spacing.fit(rows[start:stop].T))
            scales, zeros = _by_group(grids[-1])
        errors = torch.empty_like(rows[start:stop])
        for j in range(start, stop):
            group = 0 if refitted else int(order[j]) // grid.group_size
            q = (rows[j] / scales[group] + zeros[group]).round().clamp(low, high)
            integers[j] = q.to(torch.int8)
            error = (rows[j] - (q - zeros[group]) * scales[group]) / feedback[j, j]
            rows[j + 1 : stop].addr_(feedback[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        rows[stop:] -= feedback[start:stop, stop:].T @ errors
    if refitted:
        together = (
            None
            if grid.zeros is None
            else torch.cat([x.zeros for x in grids if x.zeros is not None], dim=1)
        )
        grid = replace(grid, scales=torch.cat([x.scales for x in grids], dim=1), zeros=together)
    return OnGrid(integers[order.argsort()].T.contiguous(), grid, used)


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
