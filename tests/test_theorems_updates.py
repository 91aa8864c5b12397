"""The updates of AdaSVD and SVD-LLM on random matrices: fixed points, convergence, and least
squares without activations.
"""

import pytest
import torch
from hypothesis import given
from problems import (
    SHAPES,
    STORED,
    Problem,
    examples,
    make,
    optimum,
    plain,
    problems,
    product,
    symmetric_root,
)
from torch import Tensor

from specomp.methods.adasvd import AdaComp
from specomp.methods.svd_llm import UpdateU
from specomp.numerics.factors import LowRankFactors, refit_left, refit_left_naive, refit_right
from specomp.numerics.statistics import Gram, StackedGram, Stats


def graded(m: int, n: int, rank: int, decay: float = 0.7) -> Problem:
    """Singular values of W X fall by `decay` each, so that the alternating updates converge at a
    known rate.
    """
    problem = make(m, n, rank, seed=m, tokens=3 * n)
    U, s, Vt = torch.linalg.svd(problem.W, full_matrices=False)
    s = decay ** torch.arange(len(s), dtype=torch.float64)
    return Problem((U * s) @ Vt @ torch.linalg.inv(symmetric_root(problem.gram)), problem.X, rank)


def adacomp(iterations: int, update: str = "pseudo_inverse") -> AdaComp:
    return AdaComp(
        iterations=iterations,
        update=update,
        stack_of_batch="gram",
        num_buckets=16,
        upstream="dense",
    )


@examples
@given(problems())
def test_updates_do_nothing_from_the_whitened_optimum(problem):
    start, known = optimum(problem), Stats({Gram(): problem.gram})
    update_u = UpdateU(upstream="dense", num_samples=None)
    right = LowRankFactors(start.U, refit_right(problem.W, start.U))
    for after in (
        adacomp(1)(problem.W, start, known),
        adacomp(5)(problem.W, start, known),
        update_u(problem.W, start, known),
        right,
    ):
        assert problem.loss(after) == pytest.approx(
            problem.bound, rel=1e-5, abs=STORED * problem.size
        )
        assert float((product(after) - product(start)).norm()) <= 1e-4 * float(problem.W.norm())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_updates_converge_to_the_optimum_from_a_plain_start(m, n):
    problem = graded(m, n, 4)
    start, known = plain(problem), Stats({Gram(): problem.gram})
    losses = [problem.loss(start)] + [
        problem.loss(adacomp(tau)(problem.W, start, known)) for tau in (1, 2, 3, 5, 10, 60)
    ]
    assert losses[0] > 1.05 * problem.bound
    for before, after in zip(losses, losses[1:], strict=False):
        assert after <= before * (1 + 1e-6)
    assert losses[1] < losses[0]
    assert losses[-1] == pytest.approx(problem.bound, rel=1e-5)


def test_updates_gain_where_the_inputs_have_changed():
    problem = make(10, 12, 4, 0, 40)
    drifted = Problem(problem.W, problem.X + 0.5 * make(10, 12, 4, 1, 40).X, 4)
    start, known = optimum(problem), Stats({Gram(): drifted.gram})
    once = adacomp(1)(problem.W, start, known)
    only_u = UpdateU(upstream="compressed", num_samples=None)(problem.W, start, known)
    assert drifted.bound < drifted.loss(once) < drifted.loss(start)
    assert drifted.loss(once) <= drifted.loss(only_u) < drifted.loss(start)
    assert drifted.loss(adacomp(200)(problem.W, start, known)) == pytest.approx(
        drifted.bound, rel=1e-4
    )


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_one_round_is_one_step_of_subspace_iteration(m, n):
    problem = make(m, n, 3, 2, 3 * n)
    S = torch.linalg.cholesky(problem.gram)
    A, start = problem.W @ S, plain(problem).Vt.double()
    Vt = refit_right(problem.W, refit_left(problem.W, start, problem.gram))

    def projector(rows: Tensor) -> Tensor:
        return torch.linalg.pinv(rows) @ rows

    torch.testing.assert_close(projector(Vt @ S), projector(start @ S @ A.T @ A), rtol=0, atol=1e-9)
    assert float((projector(Vt @ S) - projector(start @ S)).norm()) > 1e-2  # the step moved


@pytest.mark.parametrize(("m", "n"), [(5, 4), (4, 5), (5, 5)])
def test_the_step_of_vt_needs_no_inputs(m, n):
    problem = make(m, n, 2, 1, 9)
    U = plain(problem).U.double()
    # vec(U Vt X) = (X^T kron U) vec(Vt), columns stacked
    system = torch.kron(problem.X.T.contiguous(), U.contiguous())
    solution = (
        torch.linalg.lstsq(system, (problem.W @ problem.X).T.reshape(-1, 1))
        .solution.reshape(n, 2)
        .T
    )
    torch.testing.assert_close(refit_right(problem.W, U), solution, rtol=0, atol=1e-9)


def test_the_step_of_vt_is_a_minimizer_on_a_singular_gram_too():
    problem = make(6, 8, 3, 1, 5)
    U = plain(problem).U.double()
    smallest = float(
        (U @ torch.linalg.pinv(U) @ problem.W @ problem.X - problem.W @ problem.X).norm()
    )
    assert problem.loss(U @ refit_right(problem.W, U)) == pytest.approx(smallest, rel=1e-9)


@examples
@given(problems())
def test_the_step_of_u_from_the_gram_equals_least_squares_on_the_inputs(problem):
    Vt = plain(problem).Vt.double()
    A, B = problem.X.T @ Vt.T, problem.X.T @ problem.W.T
    U = refit_left(problem.W, Vt, problem.gram)
    torch.testing.assert_close(U, torch.linalg.lstsq(A, B).solution.T, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(U, (torch.linalg.pinv(A) @ B).T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_step_of_u_equals_the_pseudo_inverse_where_tokens_are_too_few(tokens):
    problem = make(7, 9, 5, 0, tokens)
    Vt = plain(problem).Vt.double()
    reference = (torch.linalg.pinv(problem.X.T @ Vt.T) @ (problem.X.T @ problem.W.T)).T
    torch.testing.assert_close(
        refit_left(problem.W, Vt, problem.gram), reference, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_naive_update_is_the_same_where_conditions_are_good(m, n):
    problem = make(m, n, 3, 2, 4 * n)
    Vt, known = plain(problem).Vt, Stats({Gram(): problem.gram})
    torch.testing.assert_close(
        refit_left_naive(problem.W, Vt, problem.gram).double(),
        refit_left(problem.W, Vt, problem.gram),
        rtol=1e-3,
        atol=1e-3,
    )
    losses = [
        problem.loss(adacomp(3, update)(problem.W, plain(problem), known))
        for update in ("naive", "pseudo_inverse")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_naive_update_is_worse_where_conditions_are_bad(m, n):
    X = make(m, n, 4, 2, 4 * n).X
    X[:2] *= 1e5  # two massive activations
    problem = Problem(make(m, n, 4, 2, 1).W, X, 4)
    Vt = plain(problem).Vt
    exact, naive = (
        problem.loss(refit(problem.W, Vt, problem.gram).double() @ Vt.double())
        for refit in (refit_left, refit_left_naive)
    )
    assert exact < problem.loss(plain(problem))
    assert not naive <= 10 * exact  # NaN counts as worse
    known = Stats({Gram(): problem.gram})
    exact, naive = (
        problem.loss(adacomp(1, update)(problem.W, plain(problem), known))
        for update in ("pseudo_inverse", "naive")
    )
    assert not naive <= 1.01 * exact


@pytest.mark.parametrize(
    ("stack", "statistic", "num_samples"),
    [("gram", Gram(), None), ("mean", StackedGram(4), None), ("off", Gram(), 4)],
)
def test_stack_of_batch_chooses_the_inputs_that_are_read(stack, statistic, num_samples):
    compensation = AdaComp(
        iterations=2, update="pseudo_inverse", stack_of_batch=stack, num_buckets=4, upstream="dense"
    )
    assert compensation.needs == {statistic}
    assert compensation.num_samples == num_samples
    problem = make(6, 8, 3, 0, 24)
    expected = adacomp(2)(problem.W, plain(problem), Stats({Gram(): problem.gram}))
    found = compensation(problem.W, plain(problem), Stats({statistic: problem.gram}))
    assert torch.equal(product(found), product(expected))
