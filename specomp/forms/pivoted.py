"""Pivot rows: r (m + n - r) numbers for a matrix of rank r instead of the r (m + n) of two factors
(PIFA, arXiv:2501.19090).

Pivoted   r rows of W' = U Vt, and the coefficients with which they make the other m - r   Sec. 3
(pivoting factorization) Exact for any W' of rank r; the same bytes buy a higher rank, and at full
rank nothing is lost or added. Differs from the paper: pivots come from LU with partial pivoting of
U, then rows are exchanged until no coefficient exceeds `max_growth` (maxvol, Goreinov et al. 2010;
CHOICE), so that storing both parts in low precision stays safe.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from specomp.forms.prices import Part
from specomp.forms.ranked import RankForm
from specomp.models.family import LinearSpec
from specomp.models.modules import TwoStage
from specomp.numerics.grid import GridSpec
from specomp.numerics.linalg import SOLVE_DTYPE
from specomp.settings import configurable
from specomp.slots import Chain, Evidence

# Pivot of a unit column, times sqrt(m), above which an LU needs no orthonormal basis.
INDEPENDENT = 1e-4
INDEX_BITS = 32


@configurable
class Pivoted(RankForm):
    """r pivot rows (r, n), coefficients (m - r, r), and the place of every output (m integers,
    which only bits count).
    """

    max_growth: Annotated[float, Field(ge=1.01)]

    def shapes(self, m: int, n: int, rank: int, grid: GridSpec | None) -> dict[str, Part]:
        """r (m + n - r) numbers."""
        rows = {
            "pivots.weight": Part((rank, n), grid),
            "others.weight": Part((m - rank, rank), grid),
        }
        return rows | {"order": Part((m,), index_bits=INDEX_BITS)}

    def module(self, linear: LinearSpec, rank: int, evidence: Evidence) -> nn.Module:
        """A PivotedLinear in the model's dtype. Needs rank < m."""
        factors = evidence.factors(linear, rank)
        pivots, others, coefficients = pivot_rows(factors.U.to(SOLVE_DTYPE), self.max_growth)
        place = torch.cat([pivots, others]).argsort()

        def assembled(P: Tensor, C: Tensor) -> Tensor:
            return torch.cat([P, C @ P])[place]

        rows = factors.U[pivots] @ factors.Vt

        def lefts(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            return assembled(torch.eye(rank).to(matrices[1]), matrices[1]), others

        chain = Chain((rows, coefficients), assembled, lefts=lefts)
        P, C = evidence.rounded(linear, chain)
        made = PivotedLinear.from_pivots(
            P.values, C.values, place, evidence.bias(linear), **evidence.place(linear)
        )
        made.pivots, made.others = P.stored(made.pivots), C.stored(made.others)
        return made

    def facts(self, module: nn.Module) -> dict[str, float]:
        """How much rounding errors of the pivots can grow."""
        return {"growth": module.growth()}  # type: ignore[operator]

    def notes(self, facts: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
        """The largest coefficient of all."""
        worst = max(x["growth"] for x in facts.values())
        return [f"{len(facts)} of {count} linears are pivoted, with coefficients up to {worst:.2f}"]


class PivotedLinear(TwoStage):
    """y = [P x, C (P x)] in the order of the outputs, + b: a linear of rank r kept as r (m + n - r)
    numbers (PIFA, arXiv:2501.19090).

    `pivots` P (r, n) are r rows of the weight itself, `others` C (m - r, r) write the remaining
    rows in terms of them, and `order` (m), int32, says where among both each output is found.
    """

    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.pivots = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.others = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype, device=device)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        # Where the caller makes tensors, not `device`: an engine that makes parameters alone on the
        # meta device never fills a buffer there, and reads zeros without a word (vLLM).
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))

    @classmethod
    def from_pivots(
        cls,
        rows: Tensor,
        coefficients: Tensor,
        order: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "PivotedLinear":
        """From pivot rows (r n), coefficients (m-r r), order (m) and the bias (m) of the linear it
        replaces; all are copied.
        """
        (rank, n), m = rows.shape, len(order)
        # On the meta device nothing is drawn that would be overwritten at once.
        module = cls(n, m, rank, bias=bias is not None, dtype=dtype, device="meta")
        for owner, name, value in (
            (module.pivots, "weight", rows),
            (module.others, "weight", coefficients),
            (module, "bias", bias),
        ):
            if value is not None:
                copy = value.detach().to(
                    device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
                )
                setattr(owner, name, nn.Parameter(copy))
        module.order = order.detach().to(device=device, dtype=torch.int32, copy=True)
        return module

    def expand(self, pivots: Tensor) -> Tensor:
        """y (... m) from P x (... r)."""
        rows = torch.cat([pivots, self.others(pivots)], -1)
        # on a CPU several times as fast as index_select
        out = rows.gather(-1, self.order.long().expand_as(rows))
        return out if self.bias is None else out + self.bias

    @property
    def first(self) -> nn.Linear:  # type: ignore[override]
        """The pivot rows."""
        return self.pivots

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (m n), multiplied in at least float32 and returned so."""
        rows = self.acting(self.pivots)
        return torch.cat([rows, self.acting(self.others) @ rows])[self.order.long()]

    def growth(self) -> float:
        """The largest coefficient in absolute value: how much rounding errors of the pivots can
        grow.
        """
        return float(self.acting(self.others).abs().max())


def pivot_rows(U: Tensor, max_growth: float) -> tuple[Tensor, Tensor, Tensor]:
    """(pivots (r), others (m - r), C (m - r, r)) with U[others] = C U[pivots] and |C| <=
    max_growth, for U (m, r) in float64, r < m.

    Independent of the basis: U R gives the same for every invertible R. Columns of U may depend on
    each other.
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
    """LU (m, r) with partial pivoting of the unit columns of U (m, r), and its swaps; of an
    orthonormal basis of them where that is needed.

    The latter costs more than everything else here, and is needed only where columns depend on each
    other, which a vanishing pivot shows.
    """
    LU, swaps = torch.linalg.lu_factor_ex(U)[:2]
    # entries of a unit column are about 1 / sqrt(m)
    if float(LU.diagonal().abs().min()) * math.sqrt(len(U)) > INDEPENDENT:
        return LU, swaps
    return tuple(torch.linalg.lu_factor(torch.linalg.qr(U).Q))  # type: ignore[return-value]


def exchange(C: Tensor, row: int, column: int) -> None:
    """Makes C (m - r, r) what it is when pivot `column` and the other `row` change places: a
    rank-one update.
    """
    pivot = float(C[row, column])
    left, right = C[:, column].clone(), C[row].clone()
    right[column] -= 1
    left[row] += 1
    C.addr_(left, right, alpha=-1 / pivot)
