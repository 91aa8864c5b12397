"""Pivoted packing (PIFA, arXiv:2501.19090): r (m + n - r) numbers for a matrix of rank r instead of the r (m + n) of two factors.

Pivoted   r rows of W' = U Vt, and the coefficients with which they make the other m - r   Sec. 3 (pivoting factorization)
Exact for any W' of rank r; the same bytes buy a higher rank, and at full rank nothing is lost or added.
Differs from the paper: pivots come from LU with partial pivoting of U, then rows are exchanged until no coefficient
exceeds `max_growth` (maxvol, Goreinov et al. 2010; CHOICE), so that storing both parts in low precision stays safe.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from specomp.factors import LowRankFactors
from specomp.linalg import SOLVE_DTYPE
from specomp.modules import PivotedLinear
from specomp.ratio import pivoted_cost
from specomp.settings import configurable

# Pivot of a unit column, times sqrt(m), above which an LU needs no orthonormal basis.
INDEPENDENT = 1e-4


@configurable
class Pivoted:
    """Store r pivot rows (r, n), coefficients (m - r, r), and the place of every output (m integers, counted in bytes)."""

    max_growth: Annotated[float, Field(ge=1.01)]

    def stored(self, m: int, n: int, rank: int) -> int:
        """r (m + n - r)."""
        return pivoted_cost(m, n, rank)

    def __call__(self, linear: nn.Linear, factors: LowRankFactors) -> nn.Module:
        """A PivotedLinear in the linear's dtype, on its device. Needs r < m."""
        pivots, others, coefficients = pivot_rows(factors.U.to(SOLVE_DTYPE), self.max_growth)
        place = torch.cat([pivots, others]).argsort()
        rows = factors.U[pivots] @ factors.Vt
        weight = linear.weight
        return PivotedLinear.from_pivots(rows, coefficients, place, linear.bias, dtype=weight.dtype, device=weight.device)


def pivot_rows(U: Tensor, max_growth: float) -> tuple[Tensor, Tensor, Tensor]:
    """(pivots (r), others (m - r), C (m - r, r)) with U[others] = C U[pivots] and |C| <= max_growth, for U (m, r) in float64, r < m.

    Independent of the basis: U R gives the same for every invertible R. Columns of U may depend on each other.
    """
    U = U / U.norm(dim=0).clamp_min(torch.finfo(U.dtype).tiny)
    LU, swaps = decomposed(U)
    m, rank = LU.shape
    rows = list(range(m))
    for row, other in enumerate(swaps.tolist()):
        rows[row], rows[other - 1] = rows[other - 1], rows[row]
    lower = LU[:rank].tril(-1)
    C = torch.linalg.solve_triangular(lower, LU[rank:], upper=False, left=False, unitriangular=True)
    # Each exchange multiplies the volume of the pivots by its coefficient, so this ends.
    while True:
        row, column = divmod(int(C.abs().argmax()), rank)
        if not abs(float(C[row, column])) > max_growth:  # nor where it is no number
            break
        rows[column], rows[rank + row] = rows[rank + row], rows[column]
        exchange(C, row, column)
    order = torch.tensor(rows, device=U.device)
    return order[:rank], order[rank:], C


def decomposed(U: Tensor) -> tuple[Tensor, Tensor]:
    """LU (m, r) with partial pivoting of the unit columns of U (m, r), and its swaps; of an orthonormal basis of them where that is needed.

    The latter costs more than everything else here, and is needed only where columns depend on each other, which a vanishing pivot shows.
    """
    LU, swaps = torch.linalg.lu_factor_ex(U)[:2]
    if float(LU.diagonal().abs().min()) * math.sqrt(len(U)) > INDEPENDENT:  # entries of a unit column are about 1 / sqrt(m)
        return LU, swaps
    return tuple(torch.linalg.lu_factor(torch.linalg.qr(U).Q))  # type: ignore[return-value]


def exchange(C: Tensor, row: int, column: int) -> None:
    """Makes C (m - r, r) what it is when pivot `column` and the other `row` change places: a rank-one update."""
    pivot = float(C[row, column])
    left, right = C[:, column].clone(), C[row].clone()
    right[column] -= 1
    left[row] += 1
    C.addr_(left, right, alpha=-1 / pivot)
