"""Small dense linear algebra with its accuracy checked. Shapes: m out_features, n in_features, k =
min(m, n), r rank.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SOLVE_DTYPE = torch.float64
AnyGram = Float[Tensor, "n n"] | Float[Tensor, " n"]
"""A Gram matrix, or its diagonal."""
SolveDtype = Literal["auto", "float32", "float64"]
# A Gram is symmetric, so one triangle of it is multiplied, in blocks of columns: at least this
# many, at most eight blocks.
BLOCK_COLUMNS = 192


def eigh_descending(
    matrix: Float[Tensor, "k k"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Eigenvalues, descending, and eigenvectors of a symmetric positive semi-definite matrix, in
    its dtype.

    Only its lower triangle is read. Negative eigenvalues, which only rounding produces, are
    returned as zero. Equals torch.linalg.eigh up to order and sign.
    """
    values, vectors = torch.linalg.eigh(matrix, UPLO="L")
    return values.flip(0).clamp_min(0), vectors.flip(1)


def half_weigh(matrix: Float[Tensor, "m n"], gram: AnyGram | None) -> Float[Tensor, "m n"]:
    """matrix H for an H with H + H^T = gram; None: the identity.

    H is the blocks of the Gram below its diagonal and half of those on it: little over half the
    work of matrix @ gram, and enough for all that is symmetric in the matrix, since M gram M^T = M
    H M^T + (M H M^T)^T.
    """
    if gram is None:
        return matrix / 2
    if gram.ndim == 1:
        return matrix * (gram.to(matrix.dtype) / 2)
    product = torch.empty_like(matrix)
    size = max(BLOCK_COLUMNS, math.ceil(len(gram) / 8))
    for start in range(0, len(gram), size):
        block = gram[start:, start : start + size].to(matrix.dtype, copy=True)
        block[:size] /= 2
        product[:, start : start + size] = matrix[:, start:] @ block
    return product


def congruence(matrix: Float[Tensor, "k n"], gram: AnyGram | None) -> Float[Tensor, "k k"]:
    """matrix gram matrix^T, exactly symmetric."""
    half = half_weigh(matrix, gram) @ matrix.T
    return half + half.T


def trace_of_square(matrix: Float[Tensor, "m n"], gram: AnyGram | None) -> float:
    """trace(matrix gram matrix^T), summed in float64: the squared loss of an error matrix
    (m, n).
    """
    return 2 * float((half_weigh(matrix, gram) * matrix).sum(1).double().sum())


def cholesky_damped(
    gram: Float[Tensor, "n n"], start: float, limit: float
) -> tuple[Float[Tensor, "n n"], float]:
    """Lower Cholesky factor of gram + damping mean(diag gram) I in float64, and the damping
    that was needed.

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
                f"Gram matrix ({len(gram)} x {len(gram)}) is not positive definite after damping"
                f" {limit:g} of its mean diagonal"
            )


def relative(part: float, whole: float) -> float:
    """part / whole, and 0 when both vanish."""
    return part / whole if whole > 0 else 0.0
