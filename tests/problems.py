"""Random problems for the theorem tests, and what they need to know without asking the code under
test.

Shapes: m out_features, n in_features, r rank, W (m, n), X (n, tokens) with one column per token, G
= X X^T (n, n).
"""

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from specomp.numerics.factors import GramNorm, LowRankFactors, truncate
from specomp.numerics.statistics import AbsMean, Fisher, Gram, Stats

# Spectra and factors come back in float32: nothing agrees beyond this part of the size of W X.
STORED = 2e-6
SHAPES = [(7, 13), (11, 11), (14, 9)]

examples = settings(deadline=None, max_examples=100, derandomize=True, database=None)


@dataclass(frozen=True)
class Problem:
    W: Tensor
    X: Tensor
    rank: int

    @property
    def gram(self) -> Tensor:
        return self.X @ self.X.T

    @property
    def size(self) -> float:
        return float((self.W @ self.X).norm())

    @property
    def bound(self) -> float:
        """The smallest ||(W' - W) X||_F at this rank, by a singular value decomposition of W X that
        no code under test takes part in.
        """
        return float(torch.linalg.svdvals(self.W @ self.X)[self.rank :].norm())

    def loss(self, approximation: Tensor | LowRankFactors) -> float:
        """||(W' - W) X||_F, with the activations themselves."""
        if isinstance(approximation, LowRankFactors):
            approximation = product(approximation)
        return float(((approximation - self.W) @ self.X).norm())


def pays(m: int, n: int, rank: int) -> bool:
    """Whether two factors of this rank are fewer numbers than the matrix."""
    return rank * (m + n) < m * n


def product(factors: LowRankFactors) -> Tensor:
    return factors.U.double() @ factors.Vt.double()


def make(m: int, n: int, rank: int, seed: int, tokens: int) -> Problem:
    """Correlated inputs with a mean and with features of unequal size, as activations have."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = randn(n, n) / n**0.5 + torch.eye(n, dtype=torch.float64)
    X = torch.logspace(0, 1, n, dtype=torch.float64)[:, None] * (
        mixing @ randn(n, tokens) + randn(n, 1)
    )
    return Problem(randn(m, n), X, rank)


@st.composite
def problems(draw, *, singular: bool = False) -> Problem:
    m, n = draw(st.integers(1, 24)), draw(st.integers(2 if singular else 1, 24))
    tokens = draw(st.integers(1, n - 1)) if singular else 2 * n + 8
    return make(m, n, draw(st.integers(1, min(m, n))), draw(st.integers(0, 2**16)), tokens)


def symmetric_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.sqrt()) @ vectors.T


def eigen_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.sqrt()


def by_root(problem: Problem, S: Tensor) -> Tensor:
    """trunc_r(W S) S^-1, as the papers write it."""
    U, s, Vt = torch.linalg.svd(problem.W @ S, full_matrices=False)
    r = problem.rank
    return (U[:, :r] * s[:r]) @ Vt[:r] @ torch.linalg.inv(S)


def stats(problem: Problem) -> Stats:
    """What each whitening reads, from the inputs; the gradient of FWSVD is random."""
    grad = torch.randn(
        problem.W.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return Stats(
        {
            Gram(): problem.gram,
            AbsMean(): problem.X.abs().mean(1),
            Fisher("in"): grad.square().sum(0),
            Fisher("out"): grad.square().sum(1),
        }
    )


def optimum(problem: Problem) -> LowRankFactors:
    return truncate(GramNorm(problem.gram, solve="float64").decompose(problem.W), problem.rank)


def plain(problem: Problem) -> LowRankFactors:
    return truncate(GramNorm(None, solve="float64").decompose(problem.W), problem.rank)
