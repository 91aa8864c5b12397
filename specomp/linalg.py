"""Small dense linear algebra with its accuracy checked. Shapes: m out_features, n in_features, k = min(m, n), r rank."""

import math
from typing import Literal

import torch
from torch import Tensor

SOLVE_DTYPE = torch.float64
SolveDtype = Literal["auto", "float32", "float64"]
# Symmetric products are computed as one triangle, in blocks of rows: at least this many, at most eight blocks.
BLOCK_ROWS = 192


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) descending and eigenvectors (k, k) of a symmetric positive semi-definite matrix (k, k), in its dtype.

    Only its lower triangle is read. Negative eigenvalues, which only rounding produces, are returned as zero.
    Equals torch.linalg.eigh up to order and sign.
    """
    values, vectors = torch.linalg.eigh(matrix, UPLO="L")
    return values.flip(0).clamp_min(0), vectors.flip(1)


def weigh(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """matrix (m, n) times a Gram: (n, n), its diagonal (n,), or None for the identity."""
    if gram is None:
        return matrix
    gram = gram.to(matrix.dtype)
    return matrix @ gram if gram.ndim == 2 else matrix * gram


def lower_core(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """Lower triangle of matrix gram matrix^T (k, k), for matrix (k, n); what lies above it is meaningless."""
    k = len(matrix)
    core = matrix.new_zeros(k, k)
    rows = max(BLOCK_ROWS, math.ceil(k / 8))
    for start in range(0, k, rows):
        stop = min(start + rows, k)
        core[start:stop, :stop] = weigh(matrix[start:stop], gram) @ matrix[:stop].T
    return core


def trace_of_square(matrix: Tensor, gram: Tensor | None) -> float:
    """trace(matrix gram matrix^T), summed in float64: the squared loss of an error matrix (m, n)."""
    return float((weigh(matrix, gram) * matrix).sum(1).double().sum())


def cholesky_damped(gram: Tensor, start: float, limit: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor (n, n) of gram + damping mean(diag gram) I in float64, and the damping that was needed.

    Tries 0, then `start`, times 10 each time, up to `limit`. Raises ValueError beyond that.
    """
    gram = gram.to(SOLVE_DTYPE)
    unit = gram.diagonal().mean()
    damping = 0.0
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping * unit)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor, damping
        damping = max(start, damping * 10)
        if damping > limit:
            raise ValueError(
                f"Gram matrix ({len(gram)} x {len(gram)}) is not positive definite after damping {limit:g} of its mean diagonal"
            )


def relative(part: float, whole: float) -> float:
    """part / whole, and 0 when both vanish."""
    return part / whole if whole > 0 else 0.0
