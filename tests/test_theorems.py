"""Whitened truncation on random matrices: it is the optimum, whichever way it is computed, and it
has the right symmetries.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    SHAPES,
    STORED,
    Problem,
    by_root,
    eigen_root,
    examples,
    make,
    optimum,
    pays,
    problems,
    product,
    stats,
    symmetric_root,
)
from torch import Tensor

import specomp.numerics.factors
from specomp.methods.asvd import ActivationWhitening
from specomp.methods.fwsvd import FisherWhitening
from specomp.methods.kronecker import KroneckerWhitening
from specomp.methods.svd import NoWhitening
from specomp.methods.svd_llm import CholeskyWhitening, GramWhitening
from specomp.numerics.factors import (
    CholeskyNorm,
    GramNorm,
    LowRankFactors,
    Norm,
    TwoSidedNorm,
    truncate,
)
from specomp.numerics.statistics import Fisher, Gram, OutputGradGram, Stats, TokenWeightedGram

# The whitened truncation is the optimum, whichever root of the Gram whitens (SVD-LLM, Theorem 3.2).


@examples
@given(problems())
def test_every_root_of_the_gram_gives_the_same_optimum(problem):
    references = [
        by_root(problem, root(problem.gram))
        for root in (torch.linalg.cholesky, symmetric_root, eigen_root)
    ]
    for norm in (GramNorm(problem.gram, solve="float64"), CholeskyNorm(problem.gram, 1e-8, 1e-2)):
        spectrum = norm.decompose(problem.W)
        found = truncate(spectrum, problem.rank)
        for reference in references:
            assert float((product(found) - reference).norm()) <= 1e-5 * float(problem.W.norm())
        for loss in (
            problem.loss(found),
            spectrum.tail(problem.rank),
            norm.loss(problem.W - product(found)),
        ):
            assert loss == pytest.approx(problem.bound, rel=1e-5, abs=STORED * problem.size)


@examples
@given(problems(singular=True))
def test_fewer_tokens_than_features_still_attain_the_bound(problem):
    spectrum = GramNorm(problem.gram, solve="float64").decompose(problem.W)
    assert spectrum.tail(problem.rank) == pytest.approx(
        problem.bound, rel=1e-5, abs=STORED * problem.size
    )
    assert problem.loss(truncate(spectrum, problem.rank)) == pytest.approx(
        problem.bound, rel=1e-5, abs=5 * STORED * problem.size
    )


@examples
@given(problems(), st.sampled_from(["float32", "auto", "float64"]))
def test_every_precision_attains_the_bound_as_far_as_it_can(problem, solve):
    spectrum = GramNorm(problem.gram, solve=solve).decompose(problem.W)
    # A float32 eigenproblem knows the squared loss to its rounding, relative to the largest squared
    # singular value.
    unresolved = 0.0 if solve == "float64" else 1e-5 * problem.size**2
    assert (
        problem.loss(truncate(spectrum, problem.rank))
        <= (problem.bound**2 * (1 + 1e-5) + unresolved) ** 0.5 + STORED * problem.size
    )


@examples
@given(problems())
def test_auto_is_exact_at_every_rank_that_can_be_stored(problem):
    if not pays(*problem.W.shape, problem.rank):
        problem = Problem(problem.W, problem.X, 1)
    if pays(*problem.W.shape, problem.rank):
        found = truncate(GramNorm(problem.gram, solve="auto").decompose(problem.W), problem.rank)
        assert problem.loss(found) == pytest.approx(problem.bound, rel=1e-3)


@pytest.fixture
def solved(monkeypatch) -> list[torch.dtype]:
    """The dtype of every eigenproblem solved."""
    dtypes = []
    original = specomp.numerics.factors.eigh_descending

    def spy(matrix: Tensor) -> tuple[Tensor, Tensor]:
        dtypes.append(matrix.dtype)
        return original(matrix)

    monkeypatch.setattr(specomp.numerics.factors, "eigh_descending", spy)
    return dtypes


def rotated(n: int, scales: Tensor) -> Tensor:
    """Inputs (n, n) whose Gram has the eigenvalues scales^2."""
    return torch.linalg.qr(make(n, n, 1, 3, n).W)[0] * scales


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 20), (24, 14)])
@pytest.mark.parametrize("kind", ["graded", "outlier", "cancelling"])
def test_auto_falls_to_float64_where_float32_cannot_resolve_the_loss(solved, m, n, kind):
    scales = torch.logspace(0, -6, n, dtype=torch.float64)  # the Gram's condition number is 1e12
    if kind != "graded":
        scales = torch.linspace(1, 0.5, n, dtype=torch.float64)
        scales[0] = 1e4
    X, W = rotated(n, scales), make(m, n, 1, 4, n).W
    if (
        kind == "cancelling"
    ):  # the weight is blind to the massive direction, which only rounding knows of
        massive = X[:, 0] / X[:, 0].norm()
        W = W - torch.outer(W @ massive, massive)
    spectrum = GramNorm(X @ X.T, solve="auto").decompose(W)
    assert solved == [torch.float32, torch.float64]
    ranks = [rank for rank in range(1, min(m, n)) if pays(m, n, rank)]
    for rank in ranks:
        problem = Problem(W, X, rank)
        assert problem.loss(truncate(spectrum, rank)) == pytest.approx(problem.bound, rel=1e-4)
    if kind != "graded":  # the fallback is not idle
        single = GramNorm(X @ X.T, solve="float32").decompose(W)
        assert problem.loss(truncate(single, ranks[-1])) > 1.01 * problem.bound


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_auto_stays_in_float32_on_a_benign_gram(solved, m, n):
    problem = make(m, n, 2, 0, 4 * n)
    X = problem.X / problem.X.norm(dim=1, keepdim=True)
    GramNorm(X @ X.T, solve="auto").decompose(problem.W)
    assert solved == [torch.float32]


# Nothing that only knows a diagonal of the inputs can do better on the inputs.


@examples
@given(problems(), st.sampled_from(["auto", "float64"]))
def test_no_other_whitening_loses_less_on_the_inputs(problem, solve):
    others = [
        NoWhitening(solve=solve),
        ActivationWhitening(alpha=0.5, eps=1e-6, solve=solve),
        FisherWhitening(side="in", eps=1e-6, solve=solve),
        FisherWhitening(side="out", eps=1e-6, solve=solve),
    ]
    known = stats(problem)
    best = problem.loss(
        truncate(GramWhitening(solve=solve)(known).decompose(problem.W), problem.rank)
    )
    for other in others:
        norm: Norm = other(known)
        spectrum = norm.decompose(problem.W)
        found = truncate(spectrum, problem.rank)
        assert (
            best
            <= problem.loss(found) * (1 + 1e-4)
            + 1e-4 * problem.size * (solve == "auto")
            + STORED * problem.size
        )
        # It is the optimum of its own loss.
        own = norm.loss(problem.W - product(found))
        assert own == pytest.approx(
            spectrum.tail(problem.rank), rel=1e-3, abs=1e-3 * norm.loss(problem.W)
        )


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_whitening_with_the_gram_is_a_real_gain(m, n):
    problem = make(m, n, 3, 5, 4 * n)
    known = stats(problem)
    best = problem.loss(truncate(GramWhitening(solve="auto")(known).decompose(problem.W), 3))
    for other in (
        NoWhitening(solve="auto"),
        ActivationWhitening(alpha=0.5, eps=1e-6, solve="auto"),
    ):
        assert best < 0.99 * problem.loss(truncate(other(known).decompose(problem.W), 3))
    cholesky = CholeskyWhitening(start_damping=1e-8, max_damping=1e-2)(known)
    assert problem.loss(truncate(cholesky.decompose(problem.W), 3)) == pytest.approx(best, rel=1e-4)


# FWSVD and ASVD are the same truncation with a diagonal in place of the Gram's root.


@examples
@given(problems(), st.sampled_from(["in", "out"]))
def test_fwsvd_weighs_rows_or_columns(problem, side):
    importance = stats(problem)[Fisher(side)]
    D = (importance + 1e-6 * importance.mean()).sqrt()
    norm = FisherWhitening(side=side, eps=1e-6, solve="float64")(stats(problem))
    weigh = (lambda error: error * D) if side == "in" else (lambda error: D[:, None] * error)
    singular = torch.linalg.svdvals(weigh(problem.W))
    found = product(truncate(norm.decompose(problem.W), problem.rank))
    attained = float(weigh(problem.W - found).norm())
    assert attained == pytest.approx(
        float(singular[problem.rank :].norm()), rel=1e-5, abs=STORED * float(singular.norm())
    )
    assert norm.loss(problem.W - found) == pytest.approx(attained, rel=1e-6)


@examples
@given(problems(), st.sampled_from([0.5, 1.0]))
def test_asvd_weighs_columns_by_mean_activation(problem, alpha):
    S = (problem.X.abs().mean(1) ** alpha + 1e-6).diag()
    norm = ActivationWhitening(alpha=alpha, eps=1e-6, solve="float64")(stats(problem))
    found = product(truncate(norm.decompose(problem.W), problem.rank))
    assert float((found - by_root(problem, S)).norm()) <= 1e-5 * float(problem.W.norm())


@examples
@given(problems())
def test_two_sided_norm_is_the_truncation_of_the_weighted_matrix(problem):
    left = torch.logspace(0, 1, len(problem.W), dtype=torch.float64)
    D, S = left.diag(), torch.linalg.cholesky(problem.gram)
    reference = torch.linalg.inv(D) @ by_root(Problem(D @ problem.W, problem.X, problem.rank), S)
    found = product(
        truncate(
            GramNorm(problem.gram, left=left, solve="float64").decompose(problem.W), problem.rank
        )
    )
    assert float((found - reference).norm()) <= 2e-5 * float(problem.W.norm())


# The two-sided norm: the same optimum with a full matrix on the side of the outputs.


def output_gram(m: int, *, tokens: int, seed: int = 1) -> Tensor:
    """Gradients of a real model: small, of very unequal size, fewer than outputs where
    tokens < m.
    """
    gradients = torch.randn(
        m, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    gradients = 1e-5 * torch.logspace(0, -2, m, dtype=torch.float64)[:, None] * gradients
    return gradients @ gradients.T


def damped_root(gram: Tensor, damping: float) -> Tensor:
    """D (m, m), symmetric: another root than the one under test."""
    return symmetric_root(
        gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    )


@examples
@given(
    problems(),
    st.sampled_from([3, 80]),
    st.sampled_from([1e-3, 1e-2, 0.3]),
    st.sampled_from(["auto", "float64"]),
)
def test_the_two_sided_norm_attains_the_bound(problem, tokens, damping, solve):
    H = output_gram(len(problem.W), tokens=tokens)
    D = damped_root(H, damping)
    singular = torch.linalg.svdvals(D @ problem.W @ problem.X)
    bound, size = float(singular[problem.rank :].norm()), float(singular.norm())
    norm = KroneckerWhitening(fit="independent", damping=damping, solve=solve)(
        Stats({Gram(): problem.gram, OutputGradGram(): H})
    )
    spectrum = norm.decompose(problem.W)
    found = truncate(spectrum, problem.rank)
    tolerance = 1e-3 if solve == "auto" and pays(*problem.W.shape, problem.rank) else 1e-5
    unresolved = (1e-3 if solve == "auto" else 5 * STORED) * size
    for loss in (
        float((D @ (product(found) - problem.W) @ problem.X).norm()),
        spectrum.tail(problem.rank),
    ):
        assert loss == pytest.approx(bound, rel=tolerance, abs=unresolved)
    assert norm.loss(problem.W - product(found)) == pytest.approx(
        float((D @ (product(found) - problem.W) @ problem.X).norm()), rel=1e-6
    )
    assert spectrum.damping == damping


def test_damped_inputs_are_those_of_a_text_with_some_energy_everywhere():
    """As if a share of the tokens were white noise of the mean energy."""
    torch.manual_seed(0)
    x, W = torch.randn(40, 9).double() * torch.arange(9), torch.randn(5, 9).double()
    H, G = torch.eye(5).double(), x.T @ x
    noise = (0.3 * G.diagonal().mean()).sqrt() * torch.eye(9)
    norm = KroneckerWhitening(fit="independent", damping=1e-12, solve="float64", input_damping=0.3)(
        Stats({Gram(): G, OutputGradGram(): H})
    )
    assert norm.loss(W) == pytest.approx(float((W @ torch.cat([x, noise]).T).norm()), rel=1e-6)


@examples
@given(problems())
def test_nothing_else_loses_less_in_the_two_sided_norm(problem):
    H = output_gram(len(problem.W), tokens=80)
    norm = TwoSidedNorm(problem.gram, H, 1e-2, solve="float64")
    diagonal = H.diagonal() + 1e-2 * H.diagonal().mean()
    others = [
        GramNorm(None),
        GramNorm(problem.gram),
        GramNorm(problem.gram, left=diagonal.sqrt()),
        GramNorm(None, left=diagonal.sqrt()),
    ]
    best = norm.loss(problem.W - product(truncate(norm.decompose(problem.W), problem.rank)))
    for other in others:
        worse = norm.loss(problem.W - product(truncate(other.decompose(problem.W), problem.rank)))
        assert best <= worse * (1 + 1e-5) + STORED * norm.loss(problem.W)


@examples
@given(problems())
def test_one_sided_and_diagonal_norms_are_special_cases_of_the_two_sided(problem):
    m = len(problem.W)
    diagonal = torch.logspace(0, 1, m, dtype=torch.float64)
    # Damping adds to the diagonal, which is no other norm than that of the sum.
    damped = diagonal + 1e-2 * diagonal.mean()
    pairs = [
        (torch.eye(m, dtype=torch.float64) * 3e-9, GramNorm(problem.gram, solve="float64")),
        (diagonal.diag(), GramNorm(problem.gram, left=damped.sqrt(), solve="float64")),
    ]
    for H, reference in pairs:
        found = truncate(
            TwoSidedNorm(problem.gram, H, 1e-2, solve="float64").decompose(problem.W), problem.rank
        )
        expected = truncate(reference.decompose(problem.W), problem.rank)
        assert float((product(found) - product(expected)).norm()) <= 2e-5 * float(problem.W.norm())
    importance = FisherWhitening(side="out", eps=1e-2, solve="float64")(
        Stats({Fisher("out"): diagonal})
    )
    found = truncate(
        TwoSidedNorm(None, diagonal.diag(), 1e-2, solve="float64").decompose(problem.W),
        problem.rank,
    )
    assert float(
        (product(found) - product(truncate(importance.decompose(problem.W), problem.rank))).norm()
    ) <= 2e-5 * float(problem.W.norm())


@examples
@given(problems())
def test_the_nearest_product_weighs_tokens_where_inputs_and_gradients_depend_on_each_other(problem):
    """Where they do not, both fits are one norm; where they do, the nearest product is nearer to
    the curvature, with its trace.
    """
    m, tokens = len(problem.W), problem.X.shape[1]
    gradients = torch.randn(
        m, tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    for g in (gradients / gradients.norm(dim=0), gradients * problem.X.norm(dim=0) ** 2):
        sizes = {"in": g.norm(dim=0), "out": problem.X.norm(dim=0)}
        weighted = {
            TokenWeightedGram(side): (own * sizes[side]) @ (own * sizes[side]).T
            for side, own in (("in", problem.X), ("out", g))
        }
        known = Stats({Gram(): problem.gram, OutputGradGram(): g @ g.T, **weighted})
        curvature = torch.einsum("at,bt,ct,dt->abcd", problem.X, g, problem.X, g)
        distances = {}
        for fit in ("independent", "nearest"):
            norm = KroneckerWhitening(fit=fit, damping=1e-9, solve="float64")(known)
            product_of_both = torch.einsum("ac,bd->abcd", norm.gram, norm.output_gram)
            # K-FAC is right up to the number of tokens, which is the same for all linears.
            product_of_both = product_of_both / (tokens if fit == "independent" else 1)
            distances[fit] = float((product_of_both - curvature).norm() / curvature.norm())
            if fit == "nearest":
                trace = float(norm.gram.trace() * norm.output_gram.trace())
                assert trace == pytest.approx(float(torch.einsum("abab->", curvature)), rel=1e-9)
        assert (
            distances["nearest"] <= distances["independent"] * (1 + 1e-9)
            or distances["independent"] < 0.5
        )


def test_outputs_without_any_gradient_weigh_the_same_and_next_to_nothing():
    problem = make(9, 12, 3, 0, 40)
    spectrum = TwoSidedNorm(
        problem.gram, torch.zeros(9, 9, dtype=torch.float64), 1e-2, solve="float64"
    ).decompose(problem.W)
    assert problem.loss(truncate(spectrum, 3)) == pytest.approx(problem.bound, rel=1e-4)
    assert spectrum.tail(0) <= 1e-14 * problem.size


def test_gradients_that_are_not_finite_are_refused():
    problem = make(9, 12, 3, 0, 40)
    with pytest.raises(ValueError, match="not positive definite"):
        TwoSidedNorm(
            problem.gram, torch.full((9, 9), torch.nan, dtype=torch.float64), 1e-2
        ).decompose(problem.W)


# Invariances.


def components(factors: LowRankFactors) -> Tensor:
    """The r rank-one terms (r, m, n): what factors are, up to the sign of each pair of vectors."""
    return torch.einsum("mi,in->imn", factors.U.double(), factors.Vt.double())


@examples
@given(problems(), st.sampled_from([1e-3, 0.3, 8.0, 1e4]))
def test_scale_of_the_activations_leaves_the_factors_unchanged(problem, c):
    one = truncate(GramNorm(problem.gram, solve="float64").decompose(problem.W), problem.rank)
    other = truncate(
        GramNorm(c**2 * problem.gram, solve="float64").decompose(problem.W), problem.rank
    )
    torch.testing.assert_close(components(one), components(other), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.U.abs(), other.U.abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(other.U.norm(dim=0), other.Vt.norm(dim=1), rtol=1e-5, atol=0)


@examples
@given(problems())
def test_permuting_the_inputs_permutes_vt(problem):
    order = torch.randperm(problem.W.shape[1], generator=torch.Generator().manual_seed(1))
    permuted = Problem(problem.W[:, order], problem.X[order], problem.rank)
    one, other = optimum(problem), optimum(permuted)
    torch.testing.assert_close(components(one)[:, :, order], components(other), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.Vt[:, order].abs(), other.Vt.abs(), rtol=0, atol=1e-5)


@examples
@given(problems())
def test_rotating_the_outputs_rotates_u(problem):
    m = len(problem.W)
    Q = torch.linalg.qr(
        torch.randn(m, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )[0]
    one, other = optimum(problem), optimum(Problem(Q @ problem.W, problem.X, problem.rank))
    torch.testing.assert_close(Q @ components(one), components(other), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.Vt.abs(), other.Vt.abs(), rtol=0, atol=1e-5)
