"""Counted work: floating-point operations by kind and precision, bytes through memory, bytes on disk. Pure arithmetic, no machine.

A multiply-add is two operations. Factorizations are counted by the usual leading terms (Golub and Van Loan, Matrix Computations, 5.4.5,
5.5, 8.3): they are units of time, not what a library does. Shapes: m out_features, n in_features, k = min(m, n), r rank, T tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from specomp.models.family import LinearSpec
from specomp.numerics.factors import CholeskyNorm, GramNorm, TwoSidedNorm
from specomp.numerics.linalg import BLOCK_COLUMNS
from specomp.numerics.statistics import GRAM_BLOCK, StackedGram, Statistic
from specomp.planning.sizes import FLOAT, ModelShape

Kind = Literal["product", "factorization", "memory", "disk"]
# Passes over a decoder layer's hidden states and MLP activations by what is no product (norms, rotary embeddings, gates, residuals), each
# a read or a write, and over the logits by a cross-entropy (upcast, maximum, exponentials, sum, gradient).
HIDDEN_PASSES, MLP_PASSES, LOGIT_PASSES = 30, 5, 8


@dataclass(frozen=True)
class Work:
    """Amounts by (kind, dtype): operations, or bytes for memory and disk, whose dtype is ''."""

    amounts: Mapping[tuple[Kind, str], float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        keys = {**self.amounts, **other.amounts}
        return Work({key: self.amounts.get(key, 0.0) + other.amounts.get(key, 0.0) for key in keys})

    def __mul__(self, times: float) -> "Work":
        return Work({key: times * amount for key, amount in self.amounts.items()})

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return sum(amount for (kind, _), amount in self.amounts.items() if kind in ("product", "factorization"))


NOTHING = Work()


def product(flops: float, dtype: torch.dtype) -> Work:
    """Matrix products."""
    return Work({("product", name_of(dtype)): flops})


def factorization(flops: float, dtype: torch.dtype) -> Work:
    """Eigenproblems, SVD, QR, Cholesky."""
    return Work({("factorization", name_of(dtype)): flops})


def memory(amount: float) -> Work:
    """Bytes read or written in memory."""
    return Work({("memory", ""): amount})


def disk(amount: float) -> Work:
    """Bytes of cache entries or of a model folder, written or read."""
    return Work({("disk", ""): amount})


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


# --- a model that runs


def forward(shape: ModelShape, tokens: float, length: float, dtype: torch.dtype, *, linears: float, head: bool) -> Work:
    """T tokens in sequences of `length` through all decoder layers; linears: multiply-adds of their weights for one token."""
    attention = 2 * tokens * length * shape.attention * shape.num_layers  # scores and values, the causal half
    products = 2 * tokens * (linears + (shape.head if head else 0)) + attention
    passes = tokens * shape.num_layers * (HIDDEN_PASSES * shape.hidden + MLP_PASSES * shape.widest)
    logits = LOGIT_PASSES * tokens * shape.vocabulary * FLOAT if head else 0
    return product(products, dtype) + memory(passes * shape.dtype.itemsize + logits)


def backward(
    shape: ModelShape, tokens: float, length: float, dtype: torch.dtype, *, linears: float, share: float = 1.0, weights: float = 0
) -> Work:
    """Gradients of the activations of the last `share` of the decoder layers, and of `weights` parameters."""
    once = forward(shape, tokens, length, dtype, linears=linears, head=False) * share
    return once + product(2 * tokens * (shape.head + weights), dtype) + memory(once.amounts[("memory", "")])


def gram(n: int, tokens: float, dtype: torch.dtype, updates: float) -> Work:
    """X X^T of (T, n), one triangle of blocks, added up `updates` times."""
    area = sum((min(start + GRAM_BLOCK, n) - start) * min(start + GRAM_BLOCK, n) for start in range(0, n, GRAM_BLOCK))
    return product(2 * tokens * area, dtype) + memory(3 * FLOAT * area * updates)


def reduction(statistic: Statistic, value: torch.Tensor, samples: int, length: int, dtype: torch.dtype, batches: int) -> Work:
    """What a statistic of one place does with the calibration set; value: what it will be (on the meta device)."""
    if value.ndim == 2:
        tokens = samples * length
        if isinstance(statistic, StackedGram):
            tokens = math.ceil(samples / math.ceil(samples / statistic.num_buckets)) * length
        if statistic.scope == "pair":  # not symmetric: both triangles
            tokens *= 2
        return gram(len(value), tokens, dtype, batches)
    return NOTHING  # a pass over activations that are in the processor's cache


# --- one linear


def half_product(rows: float, n: int) -> float:
    """Operations of linalg.half_weigh: (rows, n) times the blocks of a Gram on and below its diagonal."""
    size = max(BLOCK_COLUMNS, math.ceil(n / 8))
    return sum(2 * rows * (n - start) * min(size, n - start) for start in range(0, n, size))


def eigen(k: int) -> float:
    """All eigenvalues and eigenvectors of a symmetric (k, k)."""
    return 9 * k**3


def svd(m: int, n: int) -> float:
    """The thin SVD of (m, n)."""
    k = min(m, n)
    return 6 * max(m, n) * k**2 + 20 * k**3


def qr(m: int, n: int) -> float:
    """The reflectors of (m, n), m >= n."""
    return 2 * m * n**2 - 2 * n**3 / 3


def decomposition(linear: LinearSpec, norm: Any, keep: int) -> Work:
    """norm.decompose of a linear's weight with the vectors of `keep` components. `auto` is counted as float32, which it tries first."""
    m, n, k = linear.m, linear.n, min(linear.m, linear.n)
    wide = torch.float64
    if isinstance(norm, CholeskyNorm):
        found = factorization(n**3 / 3 + svd(m, n), wide)
        return found + product(2 * m * n**2 + keep * n**2, wide)
    if isinstance(norm, TwoSidedNorm):
        inner = decomposition(linear, GramNorm(norm.gram, solve=norm.solve), keep)
        return inner + factorization(m**3 / 3, wide) + product(2 * m**2 * n + m**2 * keep, wide)
    dtype = wide if getattr(norm, "solve", "auto") == "float64" else torch.float32
    weighed = getattr(norm, "gram", None)
    products = 2.0 * k * n * k + 2 * keep * k * n
    if weighed is not None and weighed.ndim == 2:
        products += half_product(k, n)
    factorizations = eigen(k)
    if m > n:
        factorizations += qr(m, n) + 4 * m * n * keep - 2 * n**2 * keep
    return product(products, dtype) + factorization(factorizations, dtype)


def loss(linear: LinearSpec, norm: Any) -> Work:
    """norm.loss of an (m, n) error in float32."""
    m, n = linear.m, linear.n
    passes = memory(4 * FLOAT * m * n)
    weighed = getattr(norm, "gram", None)
    if isinstance(norm, TwoSidedNorm):
        right = 2 * m * n**2 if weighed is not None and weighed.ndim == 2 else 0
        return product(right + half_product(n, m), torch.float32) + passes
    return product(half_product(m, n), torch.float32) + passes if weighed is not None and weighed.ndim == 2 else passes


def packed_errors(linear: LinearSpec, norm: Any, rank: int) -> Work:
    """Multiplying the factors out and taking the errors of the report."""
    return product(2 * linear.m * linear.n * rank, torch.float32) + loss(linear, norm) + memory(6 * FLOAT * linear.params)


def repair(linear: LinearSpec, compensation: Any, rank: int, gram_value: torch.Tensor) -> Work:
    """A compensation with a Gram (UpdateU, AdaComp): refits in float64, and its loss before and after."""
    m, n, r, wide = linear.m, linear.n, rank, torch.float64
    left = product(2 * n * n * r + 2 * m * n * r + 2 * n * r * r + 2 * r**3 + 2 * m * r * r, wide) + factorization(eigen(r), wide)
    right = product(2 * m * r * r + 2 * m * n * r, wide) + factorization(svd(m, r), wide)
    iterations = getattr(compensation, "iterations", None)  # of both factors; without them U is refitted once
    rounds = left if iterations is None else (left + right) * iterations
    copies = memory(3 * 2 * FLOAT * (n * n + m * n))  # to float64 and back
    gain = (product(2 * m * n * r, torch.float32) + loss(linear, GramNorm(gram_value))) * 2
    return rounds + copies + gain


def pivoting(linear: LinearSpec, rank: int) -> Work:
    """Pivot rows of U (m, r), before any exchange of rows."""
    m, r, wide = linear.m, rank, torch.float64
    return factorization(2 * qr(m, r) + m * r**2 - r**3 / 3 + 2 * r**3 / 3, wide) + product(3 * (m - r) * r**2 + 2 * r * r * linear.n, wide)


def rounding(linear: LinearSpec, quantizer: Any, rank: int) -> Work:
    """GPTQ of both factors: a Cholesky factor, its inverse and one pass of updates each; the Hessian of U; rebalancing."""
    m, n, r, wide = linear.m, linear.n, rank, torch.float64
    found = NOTHING
    if quantizer.rebalance:
        found += factorization(2 * qr(m, r) + 2 * qr(n, r) + svd(r, r), wide) + product(2 * (m + n) * r * r, wide)
    if quantizer.algorithm == "gptq":
        found += factorization(n**3 / 3 + r**3 / 3, wide) + product(n**3 + r**3 + half_product(r, n) + 2 * r * n * r, wide)
        # column by column: every column's error is spread over its block (rank-one updates, bound by memory), then over the rest
        found += product(r * n**2 + m * r**2, torch.float32) + memory(2 * FLOAT * 64 * (r * n + m * r))
    return found
