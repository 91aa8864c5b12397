"""The one decomposition behind every closed-form method, and what it yields.

Every method minimizes ||D (W' - T) S||_F over rank-r matrices W'. With D = I the optimum is U_r
U_r^T T, U_r the top eigenvectors of T G T^T and G = S S^T (Eckart-Young in the weighted norm).
Neither S nor an inverse is needed, and a singular G is no problem. For m > n, T = Q R reduces it to
R G R^T, so every eigenproblem has the size k = min(m, n).

Shapes: m out_features, n in_features, k = min(m, n), r rank.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from specomp.errors import UserError
from specomp.numerics.linalg import (
    SOLVE_DTYPE,
    AnyGram,
    SolveDtype,
    cholesky_damped,
    congruence,
    eigh_descending,
    half_weigh,
    trace_of_square,
)
from specomp.numerics.ratio import break_even_rank

# `auto` solves in float32, at half the time, where its rounding errors are this much smaller than
# the squared loss they could change.
RESOLUTION = 1e-3
NEGLIGIBLE = 1e-15


@dataclass(frozen=True)
class LowRankFactors:
    """W ~= U @ Vt, each component's length shared equally between its column of U and its row
    of Vt.
    """

    U: Float[Tensor, "m r"]
    Vt: Float[Tensor, "r n"]

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.U.shape[1]

    def product(self) -> Float[Tensor, "m n"]:
        """U @ Vt."""
        return self.U @ self.Vt


@dataclass(frozen=True)
class Spectrum:
    """All components of T in a norm, T = U @ rows, or the first of them; s descending, s_i^2 = loss
    of dropping component i.

    `rows` is Sigma V^T S^{-1} of the papers, so no component is ever divided by a small singular
    value. Knows no ratio.
    """

    U: Float[Tensor, "m kept"]
    s: Float[Tensor, " k"]
    rows: Float[Tensor, "kept n"]
    damping: float = 0.0

    def tail(self, rank: int) -> float:
        """sqrt(sum_{i > rank} s_i^2): the smallest possible loss at this rank (Eckart-Young)."""
        return float(self.s[rank:].double().square().sum().sqrt())


def truncate(spectrum: Spectrum, rank: int) -> LowRankFactors:
    """Best rank-r approximation in the norm of the spectrum; equals SVD truncation of W
    when S = I.
    """
    return balanced(spectrum.U[:, :rank], spectrum.rows[:rank])


def balanced(U: Float[Tensor, "m r"], Vt: Float[Tensor, "r n"]) -> LowRankFactors:
    """Share each component's length equally between both factors (the papers' Sigma^{1/2} on each
    side when S = I).

    Product unchanged, and independent of the scale of the activations, so that low-precision
    storage is safe.
    """
    left, right = U.norm(dim=0), Vt.norm(dim=1)
    # A component that is zero on one side (a refit on inputs that never excite it) stays as it is.
    scale = torch.where((left > 0) & (right > 0), right.sqrt() / left.sqrt(), 1)
    return LowRankFactors(U * scale, Vt / scale[:, None])


class Norm(Protocol):
    """The error that matters: ||D (W' - T) S||_F. The papers' S is the whitening matrix, D the
    identity.
    """

    def decompose(self, target: Float[Tensor, "m n"], keep: int | None = None) -> Spectrum:
        """The components of target (m, n) in this norm: all singular values, vectors of the first
        `keep` (default: all).
        """

    def loss(self, error: Float[Tensor, "m n"]) -> float:
        """||D error S||_F for an error (m, n)."""

    @property
    def gram(self) -> AnyGram | None:
        """S S^T: (n, n), a diagonal (n), or None for the identity."""

    def weigh(self, error: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """D error, in float64."""


@dataclass(frozen=True, eq=False)
class GramNorm:
    """||diag(left) E S||_F with S S^T = gram: an (n, n) Gram matrix, an (n,) diagonal, or None for
    the identity.

    left: (m,) weights of the outputs, or None. solve: the precision; `auto` is float32 where that
    is provably enough, else float64.
    """

    gram: AnyGram | None
    left: Float[Tensor, " m"] | None = None
    solve: SolveDtype = "auto"

    def decompose(self, target: Float[Tensor, "m n"], keep: int | None = None) -> Spectrum:
        """Inverse-free and Cholesky-free: eigenvectors of R G R^T (k, k). Exact to the tolerance
        above in either precision.
        """
        if self.solve != "float64":
            spectrum, rounding = self._decompose(target, torch.float32, keep)
            m, n = target.shape
            # Factors beyond the break-even rank are never stored, so that tail is the smallest loss
            # that has to be resolved.
            resolved = rounding <= RESOLUTION * spectrum.tail(math.ceil(break_even_rank(m, n))) ** 2
            if self.solve == "float32" or resolved:
                return spectrum
        return self._decompose(target, SOLVE_DTYPE, keep)[0]

    def _decompose(
        self, target: Float[Tensor, "m n"], dtype: torch.dtype, keep: int | None
    ) -> tuple[Spectrum, float]:
        """The spectrum, and the size of the rounding errors in its squared singular values."""
        weighted = target.to(dtype)
        if self.left is not None:
            weighted = self.left.to(dtype)[:, None] * weighted
        m, n = weighted.shape
        reflectors, reduced = (torch.geqrf(weighted), weighted) if m > n else (None, weighted)
        if reflectors is not None:
            reduced = reflectors[0][:n].triu()
        values, vectors = eigh_descending(congruence(reduced, self.gram))
        vectors = vectors[:, :keep]
        U = vectors
        if reflectors is not None:
            # Q P without ever forming Q.
            U = torch.ormqr(*reflectors, torch.nn.functional.pad(vectors, (0, 0, 0, m - n)))
        if self.left is not None:
            U = U / self.left.to(dtype)[:, None]
        # Every entry of R G R^T sums terms as large as those of the Gram's diagonal allow, even
        # where they cancel.
        energy = reduced.square().sum(0)
        if self.gram is not None:
            energy = energy * (self.gram.diagonal() if self.gram.ndim == 2 else self.gram)
        terms = float(energy.sum())
        rounding = torch.finfo(dtype).eps * max(terms, float(values.sum()))
        return Spectrum(U.float(), values.sqrt().float(), (vectors.T @ reduced).float()), rounding

    def loss(self, error: Float[Tensor, "m n"]) -> float:
        """sqrt(trace(E G E^T)) in the dtype of error."""
        if self.left is not None:
            error = self.left.to(error.dtype)[:, None] * error
        return math.sqrt(max(0.0, trace_of_square(error, self.gram)))

    def weigh(self, error: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """diag(left) error, in float64."""
        error = error.to(SOLVE_DTYPE)
        return error if self.left is None else self.left.to(SOLVE_DTYPE)[:, None] * error


@dataclass(frozen=True, eq=False)
class CholeskyNorm:
    """The same norm by the published route: S = chol(G), SVD of W S, then S^{-1} (SVD-LLM). Kept
    for the ablation; damping is recorded.
    """

    gram: Float[Tensor, "n n"]
    start_damping: float
    max_damping: float

    def decompose(self, target: Float[Tensor, "m n"], keep: int | None = None) -> Spectrum:
        """SVD-LLM, Algorithm 1. Raises ValueError when the Gram cannot be made positive
        definite.
        """
        S, damping = cholesky_damped(self.gram, self.start_damping, self.max_damping)
        U, s, Vt = torch.linalg.svd(target.to(SOLVE_DTYPE) @ S, full_matrices=False)
        rows = torch.linalg.solve_triangular(S, s[:keep, None] * Vt[:keep], upper=False, left=False)
        return Spectrum(U[:, :keep].float(), s.float(), rows.float(), damping)

    def loss(self, error: Float[Tensor, "m n"]) -> float:
        """In the undamped norm."""
        return GramNorm(self.gram).loss(error)

    def weigh(self, error: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """error, in float64."""
        return error.to(SOLVE_DTYPE)


@dataclass(frozen=True, eq=False)
class TwoSidedNorm:
    """||D E S||_F with S S^T = gram (n, n) and D^T D = output_gram (m, m) + damping * mean(diag
    output_gram) I.

    D = L^T for the Cholesky factor L, which damping makes exist: the components of L^T T in the
    Gram norm, with L^T U = P solved back. Equals GramNorm when output_gram is a multiple of the
    identity, and GramNorm's `left` when it is diagonal.
    """

    gram: AnyGram | None
    output_gram: Float[Tensor, "m m"]
    damping: float
    solve: SolveDtype = "auto"

    @cached_property
    def root(self) -> tuple[Float[Tensor, "m m"], float]:
        """D (m, m), upper triangular, in float64, and the damping it took: more than asked for only
        where rounding demands it.
        """
        gram = self.output_gram.to(SOLVE_DTYPE)
        unit = gram.diagonal().mean()
        # no loss depends on these outputs: all alike, and next to nothing beside another linear's
        if float(unit) == 0:
            return (
                NEGLIGIBLE * torch.eye(len(gram), dtype=SOLVE_DTYPE, device=gram.device),
                self.damping,
            )
        damped = gram / unit
        damped.diagonal().add_(self.damping)
        factor, more = cholesky_damped(damped, self.damping, 1.0)
        return (factor * unit.sqrt()).T, self.damping + more * (1 + self.damping)

    def decompose(self, target: Float[Tensor, "m n"], keep: int | None = None) -> Spectrum:
        """Exact as GramNorm is. Raises ValueError when the damped output Gram is not positive
        definite, as for non-finite gradients.
        """
        D, damping = self.root
        inner = GramNorm(self.gram, solve=self.solve).decompose(D @ target.to(SOLVE_DTYPE), keep)
        U = torch.linalg.solve_triangular(D, inner.U.to(SOLVE_DTYPE), upper=True)
        return Spectrum(U.float(), inner.s, inner.rows, damping)

    def loss(self, error: Float[Tensor, "m n"]) -> float:
        """sqrt(trace(E G E^T H)) with the damped H, in the dtype of error."""
        output_gram = self.output_gram.to(error.dtype, copy=True)
        output_gram.diagonal().add_(self.damping * self.output_gram.diagonal().double().mean())
        # Half of the larger side is enough (linalg.half_weigh).
        if error.shape[0] > error.shape[1]:
            half = half_weigh(error.T, output_gram).T
            whole = error if self.gram is None else error @ self.gram.to(error.dtype)
        else:
            half, whole = half_weigh(error, self.gram), output_gram @ error
        return math.sqrt(max(0.0, 2 * float((half * whole).sum(1).double().sum())))

    def weigh(self, error: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """D error, in float64."""
        return self.root[0] @ error.to(SOLVE_DTYPE)


def refit_left(
    target: Float[Tensor, "m n"], Vt: Float[Tensor, "r n"], gram: Float[Tensor, "n n"]
) -> Float[Tensor, "m r"]:
    """U (m, r) minimizing ||(U Vt - T) S||_F, S S^T = gram (n, n): AdaSVD Eq. 8-12, SVD-LLM's
    closed-form update.

    U = T G V (V^T G V)^+, with the pseudo-inverse taken through eigenvectors in float64. Equals
    torch.linalg.lstsq on raw activations: only G is needed, whatever the number of samples.
    """
    V = Vt.to(SOLVE_DTYPE).T
    GV = gram.to(SOLVE_DTYPE) @ V
    return target.to(SOLVE_DTYPE) @ GV @ torch.linalg.pinv(V.T @ GV, hermitian=True)


def refit_left_naive(
    target: Float[Tensor, "m n"], Vt: Float[Tensor, "r n"], gram: Float[Tensor, "n n"]
) -> Float[Tensor, "m r"]:
    """The same by the normal equations with an explicit inverse in float32 (AdaSVD Eq. 6; the
    unstable curve of its Figure 3a).
    """
    V = Vt.float().T
    GV = gram.float() @ V
    inverse, info = torch.linalg.inv_ex(V.T @ GV)
    if int(info):
        raise UserError(
            "The naive update met a singular matrix, as it may: set"
            " method.compensation.update=pseudo_inverse."
        )
    return target.float() @ GV @ inverse


def refit_right(target: Float[Tensor, "m n"], U: Float[Tensor, "m r"]) -> Float[Tensor, "r n"]:
    """Vt (r, n) = U^+ T minimizing ||U Vt - T|| in any norm on the input side (AdaSVD Eq. 13, whose
    printed transpose does not fit).
    """
    return torch.linalg.pinv(U.to(SOLVE_DTYPE)) @ target.to(SOLVE_DTYPE)
