"""Eigenvectors, damped Cholesky, and safe quotients."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specomp.numerics.linalg import (
    cholesky_damped,
    congruence,
    eigh_descending,
    half_weigh,
    relative,
    trace_of_square,
)

examples = settings(deadline=None, max_examples=50, derandomize=True, database=None)


def semidefinite(n: int, rank: int, seed: int = 0) -> Tensor:
    factor = torch.randn(
        n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return factor @ factor.T


@examples
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_eigenvectors_rebuild_the_matrix_in_descending_order(n, rank, seed, dtype):
    matrix = semidefinite(n, min(rank, n), seed).to(dtype)
    values, vectors = eigh_descending(matrix)
    tolerance = 100 * torch.finfo(dtype).eps * float(matrix.norm())
    assert values.dtype == vectors.dtype == dtype
    assert bool((values[:-1] >= values[1:]).all())
    assert bool((values >= 0).all())
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(n, dtype=dtype), rtol=0, atol=100 * torch.finfo(dtype).eps
    )


def test_rounding_below_zero_becomes_zero():
    values, _ = eigh_descending(torch.diag(torch.tensor([1.0, -1e-9, 2.0], dtype=torch.float64)))
    assert values.tolist() == [2.0, 1.0, 0.0]


def test_only_the_lower_triangle_is_read():
    matrix = semidefinite(5, 5)
    values, vectors = eigh_descending(matrix)
    garbage = matrix.tril() + torch.full_like(matrix, 7.0).triu(1)
    other_values, other_vectors = eigh_descending(garbage)
    assert torch.equal(values, other_values)
    assert torch.equal(vectors, other_vectors)


@pytest.mark.parametrize("n", [1, 191, 192, 193, 600, 1700])
@pytest.mark.parametrize("kind", ["identity", "diagonal", "full"])
def test_half_a_gram_gives_the_whole_symmetric_product(n, kind):
    matrix = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    square = semidefinite(n, 9) / n
    gram = {"identity": None, "diagonal": square.diagonal(), "full": square}[kind]
    full = {
        "identity": torch.eye(n, dtype=torch.float64),
        "diagonal": square.diagonal().diag(),
        "full": square,
    }[kind]
    before = square.clone()
    expected = matrix @ full @ matrix.T
    found = congruence(matrix, gram)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, found.T)
    assert trace_of_square(matrix, gram) == pytest.approx(float(expected.trace()), rel=1e-12)
    assert trace_of_square(matrix.float(), gram) == pytest.approx(float(expected.trace()), rel=1e-5)
    half = half_weigh(torch.eye(n, dtype=torch.float64), gram)
    torch.testing.assert_close(half + half.T, full, rtol=1e-12, atol=1e-12)
    assert half_weigh(matrix.float(), gram).dtype == torch.float32
    assert torch.equal(square, before), "a Gram is shared by the linears of a site"


def test_half_a_gram_keeps_its_digits_where_the_matrix_is_blind_to_what_dominates():
    """A loss is measured on what is left of the weight, which has next to nothing along the massive
    directions of the inputs.
    """
    massive = torch.nn.functional.normalize(
        torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=0
    )
    gram = semidefinite(400, 800) / 800 + 1e3 * torch.outer(massive, massive)
    matrix = torch.randn(300, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    matrix = (matrix - torch.outer(matrix @ massive, massive)).float()
    assert trace_of_square(matrix, gram.float()) == pytest.approx(
        float((matrix.double() @ gram * matrix.double()).sum()), rel=1e-5
    )


def test_a_positive_definite_gram_is_not_damped():
    gram = semidefinite(6, 12).float()
    factor, damping = cholesky_damped(gram, 1e-8, 1e-2)
    assert damping == 0
    assert factor.dtype == torch.float64
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, gram.double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("missing", [5e-8, 5e-7, 5e-6, 5e-5])
def test_a_singular_gram_gets_the_first_damping_that_works(missing):
    identity = torch.eye(8, dtype=torch.float64)
    gram = semidefinite(8, 3) - missing * identity
    unit = float(gram.diagonal().mean())
    factor, damping = cholesky_damped(gram, 1e-8, 1e-2)
    assert damping in [pytest.approx(1e-8 * 10**k) for k in range(7)]
    assert damping * unit > missing > damping * unit / 10 * 0.99  # ten times less was not enough
    torch.testing.assert_close(
        factor @ factor.T, gram + damping * unit * identity, rtol=1e-9, atol=1e-9
    )


def test_the_gram_is_not_changed():
    gram = semidefinite(8, 3)
    before = gram.clone()
    cholesky_damped(gram, 1e-4, 1e-2)
    assert torch.equal(gram, before)


def test_beyond_the_limit_is_an_error_with_the_numbers():
    gram = torch.diag(torch.tensor([1.0, -1.0, 2.0, 2.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"4 x 4.*not positive definite after damping 0\.01"):
        cholesky_damped(gram, 1e-8, 1e-2)


def test_relative():
    assert relative(1.0, 4.0) == 0.25
    assert relative(0.0, 0.0) == 0.0


def test_shapes_in_signatures_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match="gram"):
        half_weigh(torch.ones(3, 4), torch.eye(5))
