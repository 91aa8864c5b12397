"""The order in which dimensions can do without each other, and what stands in for those that go:
theorems, in float64.
"""

import pytest
import torch
from torch import Tensor

from specomp.numerics.elimination import (
    BLOCK,
    Elimination,
    eliminate,
    leverage,
    losses_in_order,
    losses_unrepaired,
    scaled,
    stand_in,
)

RIDGE = 1e-4


def rows(tokens: int = 400, d: int = 40, rank: int = 40, seed: int = 0) -> Tensor:
    """z (tokens, d) of this rank, heavy-tailed as the inside of a gated MLP is."""
    torch.manual_seed(seed)
    wide = torch.randn(tokens, rank).double()
    return (wide * wide.abs()) @ torch.randn(rank, d).double()


def weights(h: int = 12, d: int = 40, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(h, d).double()


def cut(z: Tensor, F: Tensor, ridge: float = RIDGE) -> Elimination:
    C = z.T @ z
    return eliminate(C, F, ridge * C.diagonal())


def measured(z: Tensor, F: Tensor, kept: Tensor, ridge: float) -> float:
    """||F z - F' z_J||^2 over the tokens, and over the noise that the ridge stands for."""
    C = z.T @ z
    error = F.clone()
    error[:, kept] -= stand_in(C, F, kept, ridge * C.diagonal())
    noise = (error.square() * (ridge * C.diagonal())).sum()
    return float((error @ z.T).square().sum() + noise)


def test_all_kept_changes_nothing():
    z, F = rows(), weights()
    found = cut(z, F)
    assert sorted(found.order.tolist()) == list(range(40))
    assert float(found.losses[-1]) == 0.0
    kept = found.order.sort().values
    assert torch.allclose(
        stand_in(z.T @ z, F, kept, RIDGE * z.square().sum(0)), F[:, kept], atol=1e-9
    )


@pytest.mark.parametrize("k", [1, 7, 20, 39])
def test_what_is_predicted_is_what_is_measured_on_the_tokens(k: int):
    z, F = rows(), weights()
    found = cut(z, F)
    assert float(found.losses[k]) == pytest.approx(measured(z, F, found.order[:k], RIDGE), rel=1e-8)


def test_nothing_is_lost_where_the_kept_span_the_rest():
    z, F = rows(rank=9), weights()
    found = cut(z, F, ridge=1e-10)
    assert float(found.losses[9]) < 1e-6 * float(found.losses[0])
    kept = found.order[:9]
    there = z[:, kept] @ stand_in(z.T @ z, F, kept, 1e-10 * z.square().sum(0)).T
    assert torch.allclose(there, z @ F.T, rtol=1e-4, atol=1e-3 * float(F.abs().max()))


@pytest.mark.parametrize("massive", [1.0, 1e2, 1e4, 1e6])
def test_losses_fall_monotonically_whatever_one_token_does(massive: float):
    """Attention sinks: one token with an energy that is a billion times the others'."""
    z, F = rows(), weights()
    z[0, :3] *= massive
    z[0] *= massive**0.5
    found = cut(z, F)
    assert bool((found.losses >= 0).all()) and bool((found.losses.diff() <= 0).all())
    for k in (5, 20, 35):
        kept = found.order[:k]
        fresh = measured(z, F, kept, RIDGE)
        assert float(found.losses[k]) == pytest.approx(fresh, rel=1e-5)


def test_units_of_measurement_do_not_matter():
    """An inner dimension ten times as large, undone in what reads it."""
    z, F = rows(), weights()
    scale = torch.logspace(-3, 3, 40).double()
    one, other = cut(z, F), cut(z * scale, F / scale)
    assert torch.equal(one.order, other.order)
    assert torch.allclose(one.losses, other.losses, rtol=1e-9)


def test_choosing_within_blocks_is_as_good_as_one_by_one():
    z, F = rows(900, 6 * BLOCK, 90), weights(20, 6 * BLOCK)
    z = z + 0.3 * torch.randn_like(z)
    C = z.T @ z
    fast, exact = (eliminate(C, F, RIDGE * C.diagonal(), exact=x) for x in (False, True))
    for k in (BLOCK // 2, 2 * BLOCK, 5 * BLOCK):
        assert float(fast.losses[k]) == pytest.approx(float(exact.losses[k]), rel=1e-3)


def test_greedy_beats_chance_and_what_does_not_look_at_the_weights():
    z, F = rows() + 0.5, weights()
    F[:, ::2] *= 0.01
    C, k = z.T @ z, 15
    found = cut(z, F)
    torch.manual_seed(3)
    for _ in range(5):
        assert float(found.losses[k]) < measured(z, F, torch.randperm(40)[:k], RIDGE)
    blind = eliminate(C, torch.eye(40).double() * C.diagonal().rsqrt(), RIDGE * C.diagonal()).order[
        :k
    ]
    assert float(found.losses[k]) < measured(z, F, blind, RIDGE)


def test_a_dimension_that_never_moves_goes_first_and_costs_nothing():
    z, F = rows(), weights()
    z[:, [4, 17]] = 0
    found = cut(z, F)
    assert set(found.order[-2:].tolist()) == {4, 17}
    assert float(found.losses[38]) == 0.0
    kept = found.order[:39]
    assert bool(stand_in(z.T @ z, F, kept, RIDGE * z.square().sum(0)).isfinite().all())


def test_the_scaled_gram_has_its_noise_on_a_diagonal_of_one():
    R, unit = scaled(torch.tensor([[4.0, 1.0], [1.0, 9.0]]), torch.tensor([5.0, 7.0]))
    assert torch.allclose(R, torch.tensor([[1.0, 1 / 12], [1 / 12, 1.0]]).double())
    assert unit.tolist() == [3.0, 4.0]


def test_noise_keeps_what_the_tokens_hardly_move():
    z, F = rows(), weights()
    z[:, 5] *= 1e-3
    C = z.T @ z
    assert eliminate(C, F, torch.zeros(40)).order[-1] == 5
    noise = torch.zeros(40)
    noise[5] = 100 * float(C.diagonal().max())
    assert eliminate(C, F, noise).order[0] == 5


def test_leverage_is_the_share_of_a_dimension_in_the_ridge_regression_of_itself():
    C = rows(rank=12).T @ rows(rank=12)
    expected = (C @ torch.linalg.inv(C + torch.eye(40).double())).diagonal()
    assert torch.allclose(leverage(C), expected, atol=1e-8)


def test_without_repair_what_is_lost_is_what_the_dropped_dimensions_give():
    z, F = rows(), weights()
    order, none = torch.randperm(40), torch.zeros(40)
    found = losses_unrepaired(z.T @ z, F, order, none)
    for k in (0, 5, 33, 40):
        dropped = z[:, order[k:]] @ F[:, order[k:]].T
        assert float(found[k]) == pytest.approx(float(dropped.square().sum()), rel=1e-8)
    repaired = losses_in_order(z.T @ z, F, order)
    assert bool((repaired <= found * (1 + 1e-9)).all())
