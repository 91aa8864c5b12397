"""Spectra, truncation, and how factors share their length. The optimality itself is in
test_theorems.py.
"""

import pytest
import torch
from torch import Tensor

from specomp.numerics.factors import (
    CholeskyNorm,
    GramNorm,
    LowRankFactors,
    Spectrum,
    balanced,
    truncate,
)

SHAPES = [(6, 10), (8, 8), (11, 5)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gram(n: int) -> Tensor:
    X = randn(n, 3 * n, seed=1)
    return X @ X.T


def norms(m: int, n: int) -> dict[str, object]:
    left = randn(m, seed=2).abs() + 0.5
    return {
        "identity": GramNorm(None, solve="float64"),
        "diagonal": GramNorm(random_gram(n).diagonal(), solve="float64"),
        "gram": GramNorm(random_gram(n), solve="float64"),
        "left": GramNorm(random_gram(n), left=left, solve="float64"),
        "cholesky": CholeskyNorm(random_gram(n), 1e-8, 1e-2),
    }


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_without_weights_truncation_is_the_svd_of_the_matrix(m, n):
    W = randn(m, n)
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    spectrum = GramNorm(None, solve="float64").decompose(W)
    torch.testing.assert_close(spectrum.s.double(), s, rtol=1e-6, atol=1e-7)
    factors = truncate(spectrum, 3)
    torch.testing.assert_close(
        factors.product().double(), (U[:, :3] * s[:3]) @ Vt[:3], rtol=1e-5, atol=1e-6
    )
    # Both factors carry the square root of the singular value, as the papers split it.
    torch.testing.assert_close(
        factors.U.double().abs(), (U[:, :3] * s[:3].sqrt()).abs(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        factors.Vt.double().abs(), (s[:3].sqrt()[:, None] * Vt[:3]).abs(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", norms(1, 1))
def test_all_components_rebuild_the_matrix(m, n, kind):
    W = randn(m, n)
    spectrum = norms(m, n)[kind].decompose(W)
    k = min(m, n)
    assert (spectrum.U.shape, spectrum.s.shape, spectrum.rows.shape) == ((m, k), (k,), (k, n))
    assert {x.dtype for x in (spectrum.U, spectrum.s, spectrum.rows)} == {torch.float32}
    assert bool((spectrum.s[:-1] >= spectrum.s[1:]).all())
    torch.testing.assert_close((spectrum.U @ spectrum.rows).double(), W, rtol=0, atol=1e-5)
    assert truncate(spectrum, k).rank == k


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", norms(1, 1))
def test_each_singular_value_is_the_loss_of_dropping_its_component(m, n, kind):
    W, norm = randn(m, n), norms(m, n)[kind]
    spectrum = norm.decompose(W)
    for i in range(min(m, n)):
        dropped = torch.outer(spectrum.U[:, i].double(), spectrum.rows[i].double())
        assert norm.loss(dropped) == pytest.approx(float(spectrum.s[i]), rel=1e-4)


@pytest.mark.parametrize("kind", ["rank_deficient", "ill_conditioned", "zero_columns", "zero_rows"])
@pytest.mark.parametrize("solve", ["float32", "auto", "float64"])
def test_tall_matrices_of_any_condition_attain_the_bound(kind, solve):
    m, n, rank = 40, 16, 5
    W, X = randn(m, n), randn(n, 3 * n, seed=1)
    if kind == "rank_deficient":
        W = randn(m, 7) @ randn(7, n, seed=2)
    elif kind == "ill_conditioned":
        W = (
            torch.linalg.qr(W)[0]
            * torch.logspace(0, -6, n, dtype=torch.float64)
            @ torch.linalg.qr(randn(n, n, seed=2))[0]
        )
    elif kind == "zero_columns":
        W[:, [0, 3, n - 1]] = 0
    else:
        W[: m - 9] = 0
    norm = GramNorm(X @ X.T, solve=solve)
    spectrum, s = norm.decompose(W), torch.linalg.svdvals(W @ X)
    U = spectrum.U.double()
    torch.testing.assert_close(U.T @ U, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(U @ spectrum.rows.double(), W, rtol=0, atol=1e-5)
    assert norm.loss(truncate(spectrum, rank).product().double() - W) == pytest.approx(
        float(s[rank:].norm()), rel=1e-4
    )


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", norms(1, 1))
def test_keep_drops_vectors_and_no_singular_value(m, n, kind):
    norm, W = norms(m, n)[kind], randn(m, n)
    whole, part = norm.decompose(W), norm.decompose(W, keep=2)
    assert torch.equal(part.s, whole.s)
    assert (part.U.shape, part.rows.shape) == ((m, 2), (2, n))
    torch.testing.assert_close(
        truncate(part, 2).product(), truncate(whole, 2).product(), rtol=1e-5, atol=1e-6
    )
    assert part.tail(2) == whole.tail(2)


def test_tail_is_the_norm_of_what_is_left():
    spectrum = Spectrum(torch.zeros(3, 3), torch.tensor([12.0, 4.0, 3.0]), torch.zeros(3, 3))
    assert [spectrum.tail(rank) for rank in range(4)] == [13.0, 5.0, 3.0, 0.0]


@pytest.mark.parametrize("kind", ["identity", "diagonal", "gram", "left"])
def test_loss_is_the_weighted_frobenius_norm(kind):
    error, norm = randn(6, 9), norms(6, 9)[kind]
    S = {
        "identity": torch.eye(9, dtype=torch.float64),
        "diagonal": random_gram(9).diagonal().sqrt().diag(),
    }
    D = norm.left.diag() if norm.left is not None else torch.eye(6, dtype=torch.float64)
    expected = float((D @ error @ S.get(kind, torch.linalg.cholesky(random_gram(9)))).norm())
    assert norm.loss(error) == pytest.approx(expected, rel=1e-10)
    assert norm.loss(error.float()) == pytest.approx(expected, rel=1e-5)


def test_cholesky_records_its_damping_and_measures_without_it():
    X = randn(8, 3)
    # Slightly indefinite, as rounding leaves a Gram of few tokens.
    gram = X @ X.T - 1e-7 * torch.eye(8, dtype=torch.float64)
    norm = CholeskyNorm(gram, 1e-8, 1e-2)
    assert norm.decompose(randn(5, 8)).damping > 0
    assert CholeskyNorm(random_gram(8), 1e-8, 1e-2).decompose(randn(5, 8)).damping == 0
    error = randn(5, 8)
    assert norm.loss(error) == pytest.approx(float((error @ X).norm()), rel=1e-5)
    with pytest.raises(ValueError, match="not positive definite"):
        CholeskyNorm(gram - torch.eye(8, dtype=torch.float64), 1e-8, 1e-2).decompose(randn(5, 8))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_balanced_factors_have_equal_lengths_and_the_same_product(scale):
    U, Vt = randn(6, 3) * scale, randn(3, 9)
    factors = balanced(U.float(), Vt.float())
    torch.testing.assert_close(factors.U.norm(dim=0), factors.Vt.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.product().double(), U @ Vt, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("side", ["U", "Vt", "both"])
def test_a_component_that_is_zero_on_one_side_stays_finite(side):
    U, Vt = randn(6, 3).float(), 100 * randn(3, 9).float()
    if side != "Vt":
        U[:, 1] = 0
    if side != "U":
        Vt[1] = 0
    factors = balanced(U, Vt)
    assert bool(factors.U.isfinite().all()) and bool(factors.Vt.isfinite().all())
    torch.testing.assert_close(factors.product(), U @ Vt, rtol=1e-4, atol=1e-4)


def test_matrices_without_signal_decompose_to_zero():
    for norm in norms(4, 6).values():
        factors = truncate(norm.decompose(torch.zeros(4, 6)), 2)
        assert torch.equal(factors.product(), torch.zeros(4, 6))
    silent = GramNorm(torch.zeros(6, 6), solve="auto").decompose(randn(4, 6))
    assert silent.tail(0) == 0
    assert bool(truncate(silent, 2).product().isfinite().all())


def test_low_rank_factors():
    factors = LowRankFactors(randn(5, 2), randn(2, 7))
    assert factors.rank == 2
    assert torch.equal(factors.product(), factors.U @ factors.Vt)
